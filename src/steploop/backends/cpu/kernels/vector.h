// Lanes: short vectors of numbers, loads and stores of whole and partial vectors. GCC's vector extensions, so that one
// text serves every CPU; a bool is a mask of int32 lanes (0 or -1) in registers and a byte in memory.
// C's own functions alone: what C++ has besides takes a quarter of a second to read, of every kernel.
#define _GLIBCXX_INCLUDE_NEXT_C_HEADERS
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <type_traits>
#include <utility>

#define ALWAYS __attribute__((always_inline))
#define APART __attribute__((noinline))
#define INLINE static inline ALWAYS

typedef uint8_t u8;
typedef int64_t i64;

template <class T, int L> struct VecOf { typedef T type __attribute__((vector_size(sizeof(T) * L))); };
template <class T, int L> using Vec = typename VecOf<T, L>::type;
template <class V> using Elem = typename std::decay<decltype(std::declval<V&>()[0])>::type;
template <class V> constexpr int lanes_of() { return sizeof(V) / sizeof(Elem<V>); }
template <class V> using MaskOf = Vec<int, lanes_of<V>()>;
template <class V, class T> using Like = Vec<T, lanes_of<V>()>;

// What a register holds, in bytes. Wider vectors would be cut into pieces that live in memory.
#if defined(__AVX512F__)
constexpr int kRegister = 64;
#elif defined(__AVX__)
constexpr int kRegister = 32;
#else
constexpr int kRegister = 16;
#endif

// Lanes that fill a register, 16, 8 or 4 at most: of words (4 bytes), and of doubles.
template <int BYTES> constexpr int at_most(int lanes) { return lanes * BYTES < kRegister ? lanes : kRegister / BYTES; }
constexpr int W16 = at_most<4>(16), W8 = at_most<4>(8), W4 = at_most<4>(4), D8 = at_most<8>(8), D4 = at_most<8>(4);

// How many lanes of a vector take part: all of them, or the first `count`.
template <int L> struct Full { static constexpr int lanes = L; static constexpr bool part = false; };
template <int L> struct Part { static constexpr int lanes = L; static constexpr bool part = true; long count; };

// f(i, lanes) for i = 0, L, 2L, ...; the last call may be partial.
template <int L, class F> INLINE void span(long n, F f) {
  long i = 0;
  for (; i + L <= n; i += L) f(i, Full<L>{});
  if (i < n) f(i, Part<L>{n - i});
}

// (x - 0 is x, that of -0.0 too; 0 + x is an addition)
template <int L, class T> INLINE Vec<T, L> every(T x) { return x - Vec<T, L>{}; }
template <int L> INLINE Vec<int, L> every_mask(bool x) { return (x ? -1 : 0) - Vec<int, L>{}; }

template <class T, int N> struct Bytes { char bytes[sizeof(T) * N]; };
template <class T, int N> INLINE void move(void* to, const void* from) {
  *(Bytes<T, N>*)to = *(const Bytes<T, N>*)from;
}

// A copy that does not share the variable's place in memory: what goes through memory would make the compiler hold the
// variable there all the time, in the loop before it too.
template <class V> INLINE V apart(V x) {
#if defined(__SSE2__)
  if constexpr (sizeof(V) == 16) asm("" : "+x"(x));
#elif defined(__aarch64__)
  if constexpr (sizeof(V) == 16) asm("" : "+w"(x));
#endif
  return x;
}

#if defined(__AVX__)
// In registers of 32 or 16 bytes a mask chooses the first words.
template <class T, int L> constexpr bool masked() { return sizeof(T) >= 4 && (sizeof(T) * L == 32 || sizeof(T) * L == 16); }
template <class T, int L> INLINE auto first_words(Part<L> m) {
  typedef Vec<int, L * sizeof(T) / 4> Words;
  Words number;
  for (int i = 0; i < lanes_of<Words>(); ++i) number[i] = i;
  return number < Words{} + (int)(m.count * (sizeof(T) / 4));
}
#endif

template <class T, int L> INLINE Vec<T, L> load(const T* p, Full<L>) {
  Vec<T, L> x;
  memcpy(&x, p, sizeof x);
  return x;
}

template <class T, int L> INLINE Vec<T, L> load(const T* p, Part<L> m) {
#ifdef __AVX512F__
  if constexpr (sizeof(T) == 4 && L == 16) {
    Vec<T, L> x;
    uint16_t k = (uint16_t)((1u << m.count) - 1);
    asm("vmovups %1, %0%{%2%}%{z%}" : "=v"(x) : "m"(*(const Bytes<T, L>*)p), "Yk"(k));
    return x;
  }
  if constexpr (sizeof(T) == 8 && L == 8) {
    Vec<T, L> x;
    uint16_t k = (uint16_t)((1u << m.count) - 1);
    asm("vmovupd %1, %0%{%2%}%{z%}" : "=v"(x) : "m"(*(const Bytes<T, L>*)p), "Yk"(k));
    return x;
  }
#endif
#ifdef __AVX__
  if constexpr (masked<T, L>()) {
    Vec<T, L> x;
    asm("vmaskmovps %1, %2, %0" : "=x"(x) : "m"(*(const Bytes<T, L>*)p), "x"(first_words<T>(m)));
    return x;
  }
#endif
  T parts[L] = {};
  for (long l = 0; l < m.count; ++l) parts[l] = p[l];
  Vec<T, L> x;
  memcpy(&x, parts, sizeof x);
  return apart(x);
}

template <class T, int L> INLINE void store(T* p, Vec<T, L> x, Full<L>) { memcpy(p, &x, sizeof x); }

template <class T, int L> INLINE void store(T* p, Vec<T, L> x, Part<L> m) {
#ifdef __AVX512F__
  if constexpr (sizeof(T) == 4 && L == 16) {
    uint16_t k = (uint16_t)((1u << m.count) - 1);
    asm("vmovups %1, %0%{%2%}" : "+m"(*(Bytes<T, L>*)p) : "v"(x), "Yk"(k));
    return;
  }
  if constexpr (sizeof(T) == 8 && L == 8) {
    uint16_t k = (uint16_t)((1u << m.count) - 1);
    asm("vmovupd %1, %0%{%2%}" : "+m"(*(Bytes<T, L>*)p) : "v"(x), "Yk"(k));
    return;
  }
#endif
#ifdef __AVX__
  if constexpr (masked<T, L>()) {
    asm("vmaskmovps %1, %2, %0" : "+m"(*(Bytes<T, L>*)p) : "x"(x), "x"(first_words<T>(m)));
    return;
  }
#endif
  T parts[L];
  x = apart(x);
  memcpy(parts, &x, sizeof x);
  for (long l = 0; l < m.count; ++l) p[l] = parts[l];
}

template <class M> INLINE Vec<int, M::lanes> load_mask(const u8* p, M m) {
  return __builtin_convertvector(load(p, m) != 0, Vec<int, M::lanes>);
}
template <class M> INLINE void store_mask(u8* p, Vec<int, M::lanes> x, M m) {
  store(p, __builtin_convertvector(x & 1, Vec<u8, M::lanes>), m);
}

template <class M> INLINE long count_of(M m) {
  if constexpr (M::part) return m.count; else return M::lanes;
}

template <class T, class M> INLINE Vec<T, M::lanes> load_strided(const T* p, long stride, M m) {
  T parts[M::lanes] = {};
  for (long l = 0; l < count_of(m); ++l) parts[l] = p[l * stride];
  return load(parts, Full<M::lanes>{});
}
template <class T, class M> INLINE void store_strided(T* p, long stride, Vec<T, M::lanes> x, M m) {
  for (long l = 0; l < count_of(m); ++l) p[l * stride] = x[l];
}
template <class M> INLINE Vec<int, M::lanes> load_mask_strided(const u8* p, long stride, M m) {
  return __builtin_convertvector(load_strided(p, stride, m) != 0, Vec<int, M::lanes>);
}
template <class M> INLINE void store_mask_strided(u8* p, long stride, Vec<int, M::lanes> x, M m) {
  for (long l = 0; l < count_of(m); ++l) p[l * stride] = x[l] != 0;
}

template <class T, class M> INLINE Vec<T, M::lanes> gather(const T* p, Vec<i64, M::lanes> index, long stride, long step, M m) {
  T parts[M::lanes] = {};
  for (long l = 0; l < count_of(m); ++l) parts[l] = p[index[l] * stride + l * step];
  return load(parts, Full<M::lanes>{});
}
template <class M> INLINE Vec<int, M::lanes> gather_mask(const u8* p, Vec<i64, M::lanes> index, long stride, long step, M m) {
  return __builtin_convertvector(gather(p, index, stride, step, m) != 0, Vec<int, M::lanes>);
}

template <int L> INLINE Vec<i64, L> counting(long first, long step) {
  Vec<i64, L> x;
  for (int l = 0; l < L; ++l) x[l] = first + l * step;
  return x;
}

template <class V> INLINE Elem<V> at0(V x) { return x[0]; }  // of a value that all lanes share

// Numbers of a row: all of them, one of them, and what is computed one number after the other.
template <class T> INLINE void copy(T* to, const T* from, long count) { memcpy(to, from, count * sizeof(T)); }
template <class T, class V> INLINE void put(T* p, V x) { *p = (T)x; }
template <class F> INLINE void alone(F f) { f(); }

// Comparisons give masks; `choose` takes one.
template <class V> INLINE MaskOf<V> less(V a, V b) { return __builtin_convertvector(a < b, MaskOf<V>); }
template <class V> INLINE MaskOf<V> less_equal(V a, V b) { return __builtin_convertvector(a <= b, MaskOf<V>); }
template <class V> INLINE MaskOf<V> greater(V a, V b) { return __builtin_convertvector(a > b, MaskOf<V>); }
template <class V> INLINE MaskOf<V> greater_equal(V a, V b) { return __builtin_convertvector(a >= b, MaskOf<V>); }
template <class V> INLINE MaskOf<V> equal(V a, V b) { return __builtin_convertvector(a == b, MaskOf<V>); }
template <class V> INLINE MaskOf<V> not_equal(V a, V b) { return __builtin_convertvector(a != b, MaskOf<V>); }
template <class V> INLINE V choose(MaskOf<V> m, V a, V b) {
  typedef decltype(a < b) Wide;
  return __builtin_convertvector(m, Wide) ? a : b;
}
template <class V> INLINE MaskOf<V> is_nan(V a) { return not_equal(a, a); }
template <class V> INLINE MaskOf<V> is_infinite(V a) {
  return equal(a, V{} + (Elem<V>)INFINITY) | equal(a, V{} - (Elem<V>)INFINITY);
}

template <class T, class V> INLINE Like<V, T> convert(V a) { return __builtin_convertvector(a, Like<V, T>); }
template <class T, class V> INLINE Like<V, T> from_mask(V a) { return __builtin_convertvector(a & 1, Like<V, T>); }
template <class V> INLINE MaskOf<V> to_mask(V a) { return not_equal(a, V{}); }

// The lanes that take part, the others replaced.
template <class V, int L> INLINE V only(Full<L>, V x, V) { return x; }
template <class V, int L> INLINE V only(Part<L> m, V x, V other) {
  Vec<int, L> lane;
  for (int l = 0; l < L; ++l) lane[l] = l;
  return choose(less(lane, Vec<int, L>{} + (int)m.count), x, other);
}

template <class V> INLINE V maximum(V a, V b) {  // NaN wins, as in torch
  V m = choose(greater(a, b), a, b);
  return choose(is_nan(a), a, m);
}
template <class V> INLINE V minimum(V a, V b) {
  V m = choose(less(a, b), a, b);
  return choose(is_nan(a), a, m);
}
template <class V> INLINE V fmaximum(V a, V b) { return choose(is_nan(a), b, choose(greater(b, a), b, a)); }
template <class V> INLINE V fminimum(V a, V b) { return choose(is_nan(a), b, choose(less(b, a), b, a)); }

// Half of a vector, from lane A on; the shuffle keeps it in registers, which the copy does not.
template <int A, class V> INLINE auto half(V x) {
  constexpr int L = lanes_of<V>();
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
  if constexpr (L == 16) return __builtin_shufflevector(x, x, A, A + 1, A + 2, A + 3, A + 4, A + 5, A + 6, A + 7);
  if constexpr (L == 8) return __builtin_shufflevector(x, x, A, A + 1, A + 2, A + 3);
  if constexpr (L == 4) return __builtin_shufflevector(x, x, A, A + 1);
#endif
#endif
  Vec<Elem<V>, L / 2> part;
  memcpy(&part, (char*)&x + A * sizeof(Elem<V>), sizeof part);
  return part;
}

// Reductions of the lanes of one vector, always in the same order.
template <class V, class F> INLINE Elem<V> fold(V x, F f) {
  constexpr int L = lanes_of<V>();
  if constexpr (L == 1) {
    return x[0];
  } else {
    auto low = half<0>(x), high = half<L / 2>(x);
    return fold(f(low, high), f);
  }
}
template <class V> INLINE Elem<V> total(V x) { return fold(x, [](auto a, auto b) ALWAYS { return a + b; }); }
template <class V> INLINE Elem<V> total_product(V x) { return fold(x, [](auto a, auto b) ALWAYS { return a * b; }); }
template <class V> INLINE Elem<V> largest(V x) { return fold(x, [](auto a, auto b) ALWAYS { return maximum(a, b); }); }
template <class V> INLINE Elem<V> smallest(V x) { return fold(x, [](auto a, auto b) ALWAYS { return minimum(a, b); }); }
template <class V> INLINE bool any_of(V x) { return fold(x, [](auto a, auto b) ALWAYS { return a | b; }) != 0; }
template <class V> INLINE bool all_of(V x) { return fold(x, [](auto a, auto b) ALWAYS { return a & b; }) != 0; }

// Indices into an axis of n entries. One that is outside becomes 0, so that nothing else is read or written, and the
// number of its check is left in `fault` for the caller to raise an error.
template <class M> INLINE Vec<i64, M::lanes> inside(Vec<i64, M::lanes> index, Vec<i64, M::lanes> n, Vec<i64, M::lanes> check, i64* fault, M m) {
  index = only(m, index, Vec<i64, M::lanes>{});
  Vec<i64, M::lanes> bad = (index < 0) | (index >= n);
  if (__builtin_expect(fold(bad, [](auto a, auto b) ALWAYS { return a | b; }) != 0, 0))
    __atomic_store_n(fault, check[0], __ATOMIC_RELAXED);
  return index & ~bad;
}
template <class M> INLINE Vec<i64, M::lanes> inside_from_end(Vec<i64, M::lanes> index, Vec<i64, M::lanes> n, Vec<i64, M::lanes> check, i64* fault, M m) {
  return inside(index + (n & (index < 0)), n, check, fault, m);
}

// The first place of the best value; a NaN is better than any number.
template <class V> INLINE MaskOf<V> better_max(V a, V b) { return greater(a, b) | (is_nan(a) & ~is_nan(b)); }
template <class V> INLINE MaskOf<V> better_min(V a, V b) { return less(a, b) | (is_nan(a) & ~is_nan(b)); }
template <class V> INLINE i64 first_best(V best, Like<V, i64> place, bool max) {
  i64 found = -1;
  Elem<V> value = 0;
  for (int l = 0; l < lanes_of<V>(); ++l) {
    if (place[l] < 0) continue;
    Elem<V> x = best[l];
    bool nan = x != x, had = value != value;
    bool wins = found < 0 || (max ? x > value : x < value) || (nan && !had);
    bool ties = x == value || (nan && had);
    if (wins || (ties && place[l] < found)) value = x, found = place[l];
  }
  return found;
}
