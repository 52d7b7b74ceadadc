// The words that loops are written in, for a GPU: a thread of the team is a warp, the lanes of a vector are its lanes, and
// every lane holds one number. (kernels/vector.h of the CPU has the same words for vectors in registers.)

// Numbers of 8 and 16 bits, which C++ would compute with as int: these stay what they are.
template <class T> struct Small {
  T x;
  INLINE_MEMBER operator T() const { return x; }
};
#define SMALL_2(op) \
  template <class T> INLINE Small<T> operator op(Small<T> a, Small<T> b) { return {(T)(a.x op b.x)}; }
SMALL_2(+) SMALL_2(-) SMALL_2(*) SMALL_2(&) SMALL_2(|) SMALL_2(^)
template <class T> INLINE Small<T> operator-(Small<T> a) { return {(T)-a.x}; }
template <class T> INLINE Small<T> operator~(Small<T> a) { return {(T)~a.x}; }

// Half precision is what is read and written; what is computed with is float.
struct bf16 {
  unsigned short bits;
  bf16() = default;
  INLINE_MEMBER explicit bf16(float x) {
    const unsigned all = ::bits_of(x);  // to the nearest, of two as near the even one; NaN stays NaN
    bits = x != x ? 0x7fc0 : (all + 0x7fff + (all >> 16 & 1)) >> 16;
  }
  INLINE_MEMBER operator float() const { return from_bits((unsigned)bits << 16); }
};
struct f16 {
  unsigned short bits;
  f16() = default;
  INLINE_MEMBER explicit f16(float x) : bits(bits_of_f16(x)) {}
  INLINE_MEMBER operator float() const { return from_f16(bits); }
};
template <class H> INLINE float round_to(float x) { return H(x); }
template <class T> struct Half { static constexpr bool is = false, brain = false; };
template <> struct Half<bf16> { static constexpr bool is = true, brain = true; };
template <> struct Half<f16> { static constexpr bool is = true, brain = false; };

template <class T> struct Holds { typedef T type; typedef T number; };
template <> struct Holds<u8> { typedef Small<u8> type; };
template <> struct Holds<int8_t> { typedef Small<int8_t> type; };
template <> struct Holds<int16_t> { typedef Small<int16_t> type; };
template <class T> struct Holds<Small<T>> { typedef T number; };
template <class T, int L> using Vec = typename Holds<T>::type;
template <class V> using Elem = typename Holds<V>::number;
template <class T> INLINE typename Holds<T>::type held(T x) { return typename Holds<T>::type{x}; }

template <class T> struct Kind { static constexpr bool real = false, sign = true; };
template <> struct Kind<float> { static constexpr bool real = true, sign = true; };
template <> struct Kind<double> { static constexpr bool real = true, sign = true; };
template <> struct Kind<u8> { static constexpr bool real = false, sign = false; };

// A bool: as Mask in registers, a byte in memory.
struct Mask {
  bool is;
};
INLINE Mask operator&(Mask a, Mask b) { return {a.is && b.is}; }
INLINE Mask operator|(Mask a, Mask b) { return {a.is || b.is}; }
INLINE Mask operator^(Mask a, Mask b) { return {a.is != b.is}; }
INLINE Mask operator~(Mask a) { return {!a.is}; }

// How many lanes run side by side: one, or all. (The names are those of vectors of several lengths.)
constexpr int W16 = WARP, W8 = WARP, W4 = WARP, D8 = WARP, D4 = WARP;
struct Lane {};

template <class T> INLINE T from_lane(Small<T> x, int other) { return (T)from_lane((int)x.x, other); }
INLINE Mask from_lane(Mask x, int other) { return {from_lane((int)x.is, other) != 0}; }

// Whatever touches memory begins by meeting the other lanes: so it sees what they wrote before, and writes nothing that
// they still read.

// f(i, lane) for all i < n.
template <int L, class F> INLINE void span(long n, F f) {
  meet_lanes();
  if constexpr (L == 1) {
    if (lane() == 0)
      for (long i = 0; i < n; ++i) f(i, Lane{});
  } else {
    for (long i = lane(); i < n; i += WARP) f(i, Lane{});
  }
}

// Numbers of a row: all of them, one of them (after a reduction, in which all lanes have met), and what is computed one
// number after the other.
template <class T> INLINE void copy(T* to, const T* from, long count) {
  meet_lanes();
  for (long i = lane(); i < count; i += WARP) to[i] = from[i];
}
template <class T, class V> INLINE void put(T* p, V x) {
  if (lane() == 0) *p = (T)x;
}
template <class F> INLINE void alone(F f) {
  meet_lanes();
  if (lane() == 0) f();
}

template <int L, class T> INLINE typename Holds<T>::type every(T x) { return held(x); }
template <int L> INLINE Mask every_mask(bool x) { return {x}; }
template <int L> INLINE i64 counting(long here, long) { return here; }
template <class T> INLINE T at0(T x) { return x; }
template <class T> INLINE T at0(Small<T> x) { return x.x; }
INLINE int at0(Mask x) { return x.is; }

template <class T> INLINE typename Holds<T>::type load(const T* p, Lane) { return held(*p); }
template <class T> INLINE typename Holds<T>::type load_strided(const T* p, long, Lane) { return held(*p); }
template <class T, class V> INLINE void store(T* p, V x, Lane) { *p = (T)x; }
template <class T, class V> INLINE void store_strided(T* p, long, V x, Lane) { *p = (T)x; }
INLINE Mask load_mask(const u8* p, Lane) { return {*p != 0}; }
INLINE Mask load_mask_strided(const u8* p, long, Lane) { return {*p != 0}; }
INLINE void store_mask(u8* p, Mask x, Lane) { *p = x.is; }
INLINE void store_mask_strided(u8* p, long, Mask x, Lane) { *p = x.is; }
template <class T> INLINE typename Holds<T>::type gather(const T* p, i64 index, long stride, long, Lane) {
  return held(p[index * stride]);
}
INLINE Mask gather_mask(const u8* p, i64 index, long stride, long, Lane) { return {p[index * stride] != 0}; }

template <class V> INLINE Mask less(V a, V b) { return {a < b}; }
template <class V> INLINE Mask less_equal(V a, V b) { return {a <= b}; }
template <class V> INLINE Mask greater(V a, V b) { return {a > b}; }
template <class V> INLINE Mask greater_equal(V a, V b) { return {a >= b}; }
template <class V> INLINE Mask equal(V a, V b) { return {a == b}; }
template <class V> INLINE Mask not_equal(V a, V b) { return {a != b}; }
INLINE Mask less(Mask a, Mask b) { return {a.is < b.is}; }
INLINE Mask less_equal(Mask a, Mask b) { return {a.is <= b.is}; }
INLINE Mask greater(Mask a, Mask b) { return {a.is > b.is}; }
INLINE Mask greater_equal(Mask a, Mask b) { return {a.is >= b.is}; }
INLINE Mask equal(Mask a, Mask b) { return {a.is == b.is}; }
INLINE Mask not_equal(Mask a, Mask b) { return {a.is != b.is}; }
template <class V> INLINE V choose(Mask m, V a, V b) { return m.is ? a : b; }
template <class V> INLINE Mask is_nan(V a) { return {a != a}; }
template <class V> INLINE Mask is_infinite(V a) { return {a == (V)INFINITY || a == -(V)INFINITY}; }

template <class T, class V> INLINE typename Holds<T>::type convert(V a) { return held((T)(Elem<V>)a); }
template <class T> INLINE typename Holds<T>::type from_mask(Mask a) { return held((T)a.is); }
template <class V> INLINE Mask to_mask(V a) { return {(Elem<V>)a != (Elem<V>)0}; }
template <class V> INLINE V only(Lane, V x, V) { return x; }  // lanes that take no part run nothing

template <class V> INLINE V maximum(V a, V b) { return a != a ? a : a > b ? a : b; }  // NaN wins, as in torch
template <class V> INLINE V minimum(V a, V b) { return a != a ? a : a < b ? a : b; }
template <class V> INLINE V fmaximum(V a, V b) { return a != a ? b : b > a ? b : a; }
template <class V> INLINE V fminimum(V a, V b) { return a != a ? b : b < a ? b : a; }

// Reductions of the numbers of all lanes, always in the same order. Every lane gets the result.
template <class V, class F> INLINE V fold(V x, F f) {
  for (int apart = WARP / 2; apart; apart /= 2) x = f(x, V{from_lane(x, lane() ^ apart)});
  return x;
}
template <class V> INLINE V total(V x) { return fold(x, [](V a, V b) { return a + b; }); }
template <class V> INLINE V total_product(V x) { return fold(x, [](V a, V b) { return a * b; }); }
template <class V> INLINE V largest(V x) { return fold(x, [](V a, V b) { return maximum(a, b); }); }
template <class V> INLINE V smallest(V x) { return fold(x, [](V a, V b) { return minimum(a, b); }); }
INLINE bool any_of(Mask x) { return fold(x, [](Mask a, Mask b) { return a | b; }).is; }
INLINE bool all_of(Mask x) { return fold(x, [](Mask a, Mask b) { return a & b; }).is; }

// The first place of the best value; a NaN is better than any number.
template <class V> INLINE Mask better_max(V a, V b) { return {a > b || (a != a && b == b)}; }
template <class V> INLINE Mask better_min(V a, V b) { return {a < b || (a != a && b == b)}; }
template <class V> INLINE i64 first_best(V best, i64 place, bool max) {
  for (int apart = WARP / 2; apart; apart /= 2) {
    const V x = V{from_lane(best, lane() ^ apart)};
    const i64 there = from_lane(place, lane() ^ apart);
    if (there < 0) continue;
    const bool wins = (max ? better_max(x, best) : better_min(x, best)).is;
    const bool loses = (max ? better_max(best, x) : better_min(best, x)).is;
    if (place < 0 || wins || (!loses && there < place)) best = x, place = there;
  }
  return place;
}

// Indices into an axis of n entries. One that is outside becomes 0, so that nothing else is read or written, and the
// number of its check is left in `fault` for the caller to raise an error.
INLINE i64 inside(i64 index, i64 n, i64 check, i64* fault, Lane) {
  if (index >= 0 && index < n) return index;
  note(fault, check);
  return 0;
}
INLINE i64 inside_from_end(i64 index, i64 n, i64 check, i64* fault, Lane m) {
  return inside(index < 0 ? index + n : index, n, check, fault, m);
}
