// Elementary functions, by the device's own library.

#define REAL(name, f, g) \
  INLINE float name(float x) { return f(x); } \
  INLINE double name(double x) { return g(x); }
#define REAL_2(name, f, g) \
  INLINE float name(float x, float y) { return f(x, y); } \
  INLINE double name(double x, double y) { return g(x, y); }
REAL(lanes_floor, floorf, floor)
REAL(lanes_ceil, ceilf, ceil)
REAL(lanes_trunc, truncf, trunc)
REAL(lanes_rint, rintf, rint)
REAL(exponential, expf, exp)
REAL(lanes_exp2, exp2f, exp2)
REAL(lanes_expm1, expm1f, expm1)
REAL(logarithm, logf, log)
REAL(logarithm_1p, log1pf, log1p)
REAL(lanes_log2, log2f, log2)
REAL(lanes_log10, log10f, log10)
REAL(hyperbolic_tangent, tanhf, tanh)
REAL(error_function, erff, erf)
REAL(lanes_erfc, erfcf, erfc)
REAL(lanes_lgamma, lgammaf, lgamma)
REAL(lanes_sin, sinf, sin)
REAL(lanes_cos, cosf, cos)
REAL(lanes_tan, tanf, tan)
REAL(lanes_asin, asinf, asin)
REAL(lanes_acos, acosf, acos)
REAL(lanes_atan, atanf, atan)
REAL(lanes_sinh, sinhf, sinh)
REAL(lanes_cosh, coshf, cosh)
REAL(lanes_asinh, asinhf, asinh)
REAL(lanes_acosh, acoshf, acosh)
REAL(lanes_atanh, atanhf, atanh)
REAL(square_root, sqrtf, sqrt)
REAL_2(lanes_atan2, atan2f, atan2)
REAL_2(lanes_hypot, hypotf, hypot)
REAL_2(lanes_pow, powf, pow)
REAL_2(with_sign, copysignf, copysign)
REAL_2(fmod_real, fmodf, fmod)

template <class V> INLINE V absolute(V x) {
  if constexpr (Kind<V>::real) return with_sign(x, (V)1);
  else return x < (V)0 ? -x : x;
}
template <class T> INLINE Small<T> absolute(Small<T> x) { return x.x < 0 ? -x : x; }
template <class V> INLINE V sigmoid(V x) { return (V)1 / ((V)1 + exponential(-x)); }
template <class V> INLINE V reciprocal(V x) { return (V)1 / x; }
template <class V> INLINE V reciprocal_root(V x) { return (V)1 / square_root(x); }
template <class V> INLINE V sign_of(V x) { return V{(Elem<V>)(((Elem<V>)x > 0) - ((Elem<V>)x < 0))}; }

// Division of integers never traps: x / 0 is 0 here (the caller has looked for zeros, and raises an error).
template <class T> INLINE T whole_divide(T x, T y) { return y == 0 ? 0 : Kind<T>::sign && y == (T)-1 ? (T)-x : (T)(x / y); }
template <class T> INLINE T whole_rest(T x, T y) { return y == 0 || (Kind<T>::sign && y == (T)-1) ? 0 : (T)(x % y); }

template <class V> INLINE V trunc_divide(V a, V b) {
  if constexpr (Kind<V>::real) return lanes_trunc(a / b);
  else return V{whole_divide<Elem<V>>(a, b)};
}
template <class V> INLINE V fmod_of(V a, V b) {
  if constexpr (Kind<V>::real) return fmod_real(a, b);
  else return V{whole_rest<Elem<V>>(a, b)};
}
template <class V> INLINE V remainder_of(V a, V b) {
  typedef Elem<V> T;
  const T r = fmod_of(a, b);
  return V{r != 0 && (r < 0) != ((T)b < 0) ? (T)(r + (T)b) : r};
}
template <class V> INLINE V floor_divide(V a, V b) {
  typedef Elem<V> T;
  const T mod = fmod_of(a, b);
  const bool down = mod != 0 && (mod < 0) != ((T)b < 0);
  if constexpr (Kind<V>::real) {
    if (b == 0) return a / b;
    V div = (a - mod) / b;
    if (down) div = div - 1;
    const V low = lanes_floor(div);
    return div == 0 ? with_sign((V)0, a / b) : div - low > (V)0.5 ? low + 1 : low;
  } else {
    const T q = whole_divide<T>(a, b);
    return V{down ? (T)(q - 1) : q};
  }
}

// Shifts by less than nothing, or by all bits and more: nothing is left but the sign.
template <class V> INLINE V shift_left(V a, V b) {
  typedef Elem<V> T;
  const T x = a, y = b;
  return V{y < 0 || y >= (T)(8 * sizeof(T)) ? (T)0 : (T)((unsigned long)x << y)};
}
template <class V> INLINE V shift_right(V a, V b) {
  typedef Elem<V> T;
  const T x = a, y = b;
  constexpr int most = 8 * sizeof(T) - Kind<T>::sign;
  return V{y < 0 || y >= (T)most ? (T)(Kind<T>::sign ? x >> most : 0) : (T)(x >> y)};
}
