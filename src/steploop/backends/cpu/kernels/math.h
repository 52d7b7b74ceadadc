// Elementary functions on vectors. float: own polynomials, error bounds in ulp beside each (measured over all floats
// of the range by the tests); double: the C library, lane by lane.

template <class V, class F> INLINE V lanewise(V x, F f) {
  V y;
  for (int l = 0; l < lanes_of<V>(); ++l) y[l] = f(x[l]);
  return y;
}
template <class V, class F> INLINE V lanewise(V x, V z, F f) {
  V y;
  for (int l = 0; l < lanes_of<V>(); ++l) y[l] = f(x[l], z[l]);
  return y;
}
template <class V> constexpr bool is_float() { return std::is_same<Elem<V>, float>::value; }
template <class V> constexpr bool is_real() { return std::is_floating_point<Elem<V>>::value; }

inline float of(float x, float (*f)(float), double (*)(double)) { return f(x); }
inline double of(double x, float (*)(float), double (*g)(double)) { return g(x); }

#define LANES(name, f, g) \
  template <class V> INLINE V name(V x) { \
    return lanewise(x, [](auto a) { if constexpr (sizeof a == 4) return f(a); else return g(a); }); \
  }
#define LANES_2(name, f, g) \
  template <class V> INLINE V name(V x, V y) { \
    return lanewise(x, y, [](auto a, auto b) { if constexpr (sizeof a == 4) return f(a, b); else return g(a, b); }); \
  }
LANES(lanes_floor, __builtin_floorf, __builtin_floor)
LANES(lanes_ceil, __builtin_ceilf, __builtin_ceil)
LANES(lanes_trunc, __builtin_truncf, __builtin_trunc)
LANES(lanes_rint, __builtin_rintf, __builtin_rint)
LANES(lanes_exp, expf, exp)
LANES(lanes_exp2, exp2f, exp2)
LANES(lanes_expm1, expm1f, expm1)
LANES(lanes_log, logf, log)
LANES(lanes_log1p, log1pf, log1p)
LANES(lanes_log2, log2f, log2)
LANES(lanes_log10, log10f, log10)
LANES(lanes_tanh, tanhf, tanh)
LANES(lanes_erf, erff, erf)
LANES(lanes_erfc, erfcf, erfc)
LANES(lanes_lgamma, lgammaf, lgamma)
LANES(lanes_sin, sinf, sin)
LANES(lanes_cos, cosf, cos)
LANES(lanes_tan, tanf, tan)
LANES(lanes_asin, asinf, asin)
LANES(lanes_acos, acosf, acos)
LANES(lanes_atan, atanf, atan)
LANES(lanes_sinh, sinhf, sinh)
LANES(lanes_cosh, coshf, cosh)
LANES(lanes_asinh, asinhf, asinh)
LANES(lanes_acosh, acoshf, acosh)
LANES(lanes_atanh, atanhf, atanh)
LANES_2(lanes_atan2, atan2f, atan2)
LANES_2(lanes_hypot, hypotf, hypot)
LANES_2(lanes_pow, powf, pow)
LANES_2(fmod_real, fmodf, fmod)

// Signs by their bit: lane by lane the compiler would take every number out of the vector and put it back.
template <class V> using BitsOf = Like<V, typename std::conditional<sizeof(Elem<V>) == 4, int, i64>::type>;
template <class V> INLINE BitsOf<V> bits_of(V x) {
  BitsOf<V> bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
template <class V> INLINE V from_bits(BitsOf<V> bits) {
  V x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
template <class V> constexpr Elem<BitsOf<V>> sign_bit() { return (Elem<BitsOf<V>>)1 << (sizeof(Elem<V>) * 8 - 1); }
template <class V> INLINE V with_sign(V x, V sign) {
  return from_bits<V>((bits_of(x) & ~sign_bit<V>()) | (bits_of(sign) & sign_bit<V>()));
}
template <class V> INLINE V absolute(V x) {
  if constexpr (is_real<V>()) return from_bits<V>(bits_of(x) & ~sign_bit<V>());
  else return choose(less(x, V{}), -x, x);
}
template <class V> INLINE V square_root(V x) {
  return lanewise(x, [](auto a) { if constexpr (sizeof a == 4) return __builtin_sqrtf(a); else return __builtin_sqrt(a); });
}
// a / b for a normal quotient and a normal b below 2^126, to 1 ulp. With 16 lanes an estimate and two corrections take a fourth of
// the time of a division.
template <class V> INLINE V quotient(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (is_float<V>() && lanes_of<V>() == 16) {
    V y;
    __asm__("vrcp14ps %1, %0" : "=v"(y) : "v"(b));
    y = y + y * (1.f - b * y);
    V q = a * y;
    return q + y * (a - b * q);
  }
#endif
  return a / b;
}
template <class V> INLINE V reciprocal(V x) { return (Elem<V>)1 / x; }
template <class V> INLINE V reciprocal_root(V x) { return (Elem<V>)1 / square_root(x); }
template <class V> INLINE V sign_of(V x) {
  V one = V{} + (Elem<V>)1;
  return choose(greater(x, V{}), one, V{}) - choose(less(x, V{}), one, V{});
}

// Division of integers never traps: x / 0 is 0 here (the caller has looked for zeros, and raises an error).
template <class T> constexpr bool is_minus_one(T y) { return std::is_signed<T>::value && y == (T)-1; }
template <class V> INLINE V trunc_divide(V a, V b) {
  if constexpr (is_real<V>()) return lanes_trunc(a / b);
  else return lanewise(a, b, [](auto x, auto y) { return (decltype(x))(y == 0 ? 0 : is_minus_one(y) ? -x : x / y); });
}
template <class V> INLINE V fmod_of(V a, V b) {
  if constexpr (is_real<V>()) return fmod_real(a, b);
  else return lanewise(a, b, [](auto x, auto y) { return (decltype(x))(y == 0 || is_minus_one(y) ? 0 : x % y); });
}
template <class V> INLINE V remainder_of(V a, V b) {
  V r = fmod_of(a, b);
  return choose(not_equal(r, V{}) & (less(r, V{}) ^ less(b, V{})), r + b, r);
}
template <class V> INLINE V floor_divide(V a, V b) {
  if constexpr (is_real<V>()) {
    V mod = fmod_real(a, b);
    V div = (a - mod) / b;
    V one = V{} + (Elem<V>)1;
    div = choose(not_equal(mod, V{}) & (less(mod, V{}) ^ less(b, V{})), div - one, div);
    V low = lanes_floor(div);
    V found = choose(greater(div - low, V{} + (Elem<V>)0.5), low + one, low);
    found = choose(equal(div, V{}), with_sign(V{}, a / b), found);
    return choose(equal(b, V{}), a / b, found);
  } else {
    V q = trunc_divide(a, b);
    V r = fmod_of(a, b);
    return choose(not_equal(r, V{}) & (less(r, V{}) ^ less(b, V{})), q - (Elem<V>)1, q);
  }
}

// Shifts by less than nothing, or by all bits and more: nothing is left but the sign.
template <class V> INLINE V shift_left(V a, V b) {
  return lanewise(a, b, [](auto x, auto y) {
    using T = decltype(x);
    constexpr int bits = 8 * sizeof(T);
    return y < 0 || y >= (T)bits ? (T)0 : (T)((typename std::make_unsigned<T>::type)x << y);
  });
}
template <class V> INLINE V shift_right(V a, V b) {
  return lanewise(a, b, [](auto x, auto y) {
    using T = decltype(x);
    constexpr int most = 8 * sizeof(T) - std::is_signed<T>::value;
    return (T)(y < 0 || y >= (T)most ? most == 8 * sizeof(T) ? 0 : x >> most : x >> y);
  });
}

// n = round(x / ln 2) and the rest r = x - n ln 2, |r| <= ln 2 / 2
template <class V> INLINE V split_ln2(V x, V& n) {
  V z = x * 1.44269504088896341f;
  n = (z + 12582912.f) - 12582912.f;
  V r = x - n * 0.693359375f;
  return r - n * -2.12194440e-4f;
}
template <class V> INLINE V power_of_two(Like<V, int> n) {
  Like<V, int> bits = (n + 127) << 23;
  V x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
// (e^r - 1 - r) / r^2 for |r| <= ln 2 / 2
template <class V> INLINE V exp_tail(V r) {
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  return p * r + 5.0000001201e-1f;
}

template <class V> INLINE V exponential(V x) {  // float: 2 ulp
  if constexpr (!is_float<V>()) {
    return lanes_exp(x);
  } else {
    V top = V{} + 88.7228394f, bottom = V{} - 103.972084f;
    V inside = choose(greater(x, top), top, choose(less(x, bottom), bottom, x));
    V n, r = split_ln2(inside, n);
    V p = exp_tail(r) * (r * r) + r + 1.f;
    Like<V, int> k = __builtin_convertvector(choose(is_nan(x), V{}, n), Like<V, int>);
    Like<V, int> half = k >> 1;
    p = p * power_of_two<V>(half) * power_of_two<V>(k - half);
    return choose(greater(x, top), V{} + INFINITY, choose(less(x, bottom), V{}, p));
  }
}

template <class V> INLINE V sigmoid(V x) {  // float: 3 ulp
  if constexpr (!is_float<V>()) {
    return (Elem<V>)1 / ((Elem<V>)1 + exponential(-x));
  } else {  // 1 / (1 + e^-x), all of it by 2^-4: near the edge e^-x has no float, and the result is denormal
    V edge = V{} + 88.7228394f;  // beyond it torch's e^-x is infinite
    V y = choose(less(x, -edge), edge, choose(greater(x, edge), -edge, -x));
    y = choose(less(y, V{} - 80.f), V{} - 80.f, y);
    V n, r = split_ln2(y, n);
    V s = power_of_two<V>(__builtin_convertvector(choose(is_nan(x), V{}, n), Like<V, int>) - 4);
    V e = (exp_tail(r) * (r * r) + r) * s + s;
    return choose(less(x, -edge), V{}, quotient(V{} + 1.f, e + 0.0625f) * 0.0625f);
  }
}

template <class V> INLINE V hyperbolic_tangent(V x) {  // float: 3 ulp
  if constexpr (!is_float<V>()) {
    return lanes_tanh(x);
  } else {
    V top = V{} + 18.f;  // e^2x - 1 over e^2x + 1
    V y = x * 2.f;
    V inside = choose(greater(y, top), top, choose(less(y, -top), -top, y));
    V n, r = split_ln2(inside, n);
    V s = power_of_two<V>(__builtin_convertvector(choose(is_nan(x), V{}, n), Like<V, int>));
    V p = exp_tail(r) * (r * r) + r;
    V e = s * p + (s - 1.f);
    V t = quotient(e, e + 2.f);
    V tiny = absolute(x);
    return choose(less(tiny, V{} + 1e-4f), x, t);
  }
}

template <class V> INLINE V logarithm(V x) {  // float: 2 ulp
  if constexpr (!is_float<V>()) {
    return lanes_log(x);
  } else {
    typedef Like<V, int> I;
    MaskOf<V> tiny = less(x, V{} + 1.17549435e-38f);  // a denormal's exponent says nothing
    V normal = choose(tiny, x * 8388608.f, x);
    I bits;
    memcpy(&bits, &normal, sizeof bits);
    I k = (bits - 0x3f3504f3) >> 23;  // x = 2^k m, m in [sqrt(1/2), sqrt(2))
    I rest = bits - (k << 23);
    V m;
    memcpy(&m, &rest, sizeof m);
    V f = m - 1.f, e = __builtin_convertvector(k, V) - choose(tiny, V{} + 23.f, V{}), z = f * f;
    V p = f * 7.0376836292e-2f + -1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f + -1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f + -1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f + -2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    V y = p * f * z + e * -2.12194440e-4f - 0.5f * z;
    y = f + y + e * 0.693359375f;
    y = choose(less(x, V{}) | is_nan(x), V{} + NAN, y);
    y = choose(equal(x, V{}), V{} - INFINITY, y);
    return choose(equal(x, V{} + INFINITY), x, y);
  }
}

template <class V> INLINE V logarithm_1p(V x) {  // float: 3 ulp
  if constexpr (!is_float<V>()) {
    return lanes_log1p(x);
  } else {
    V u = x + 1.f;
    V y = logarithm(u) - ((u - 1.f) - x) / u;
    y = choose(equal(u, V{}) | equal(u, V{} + INFINITY), logarithm(u), y);
    return choose(equal(u, V{} + 1.f), x, y);
  }
}

template <class V> INLINE V error_function(V x) {  // float: 3 ulp; coefficients after N. Juffa
  if constexpr (!is_float<V>()) {
    return lanes_erf(x);
  } else {
    V t = absolute(x), s = x * x;
    V u = t * -3.88396438e-3f + 2.42546219e-2f;
    V r = t * -1.72853470e-5f + 3.83197126e-4f;
    r = r * s + u;
    r = r * t + -1.06777877e-1f;
    r = r * t + -6.34846687e-1f;
    r = r * t + -1.28717512e-1f;
    r = r * t - t;
    r = 1.f - exponential(choose(greater(t, V{} + 4.f), V{} - 104.f, r));
    r = with_sign(r, x);
    V p = s * -5.96761703e-4f + 4.99119423e-3f;
    p = p * s + -2.67681349e-2f;
    p = p * s + 1.12819925e-1f;
    p = p * s + -3.76125336e-1f;
    p = p * s + 1.28379166e-1f;
    return choose(is_nan(x), x, choose(greater(t, V{} + 0.927734375f), r, p * x + x));
  }
}
