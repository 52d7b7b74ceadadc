// The library of products: weights are packed once per call into panels of a few vectors of columns, each panel holding
// all k one after the other; a block of rows keeps its sums in registers.

#if defined(__AVX512F__)
constexpr int kVectors = 4, kRows = 6;
#elif defined(__AVX__)
constexpr int kVectors = 2, kRows = 6;
#else
constexpr int kVectors = 2, kRows = 4;
#endif

template <class T> constexpr int width() { return kRegister / sizeof(T); }
template <class T> constexpr int panel() { return kVectors * width<T>(); }
template <class T> INLINE long packed_size(long k, long n) { return k * ((n + width<T>() - 1) / width<T>() * width<T>()); }

// sum + a * b, rounded once where the CPU can. Compilers do that by themselves, but for some CPUs not in a loop with a
// single sum: then bits would change with the number of rows or columns at hand.
template <class F> INLINE F fused(F sum, F a, F b) {
#if defined(__FMA__) && defined(__x86_64__)
  if constexpr (std::is_same<Elem<F>, float>::value) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
  if constexpr (std::is_same<Elem<F>, double>::value) {
    asm("vfmadd231pd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
#endif
  return sum + a * b;
}

// Lanes of a, then of b, by number: those with the bit S come from the other block.
template <class V, int S, bool UPPER, int... I> INLINE V exchanged(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int L = sizeof...(I);
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, (UPPER ? (I & S ? L + I : I + S) : (I & S ? L + I - S : I))...);
#else
  typedef Vec<typename std::conditional<sizeof(V) == 4 * L, int, i64>::type, L> Lanes;
  return __builtin_shuffle(a, b, Lanes{(UPPER ? (I & S ? L + I : I + S) : (I & S ? L + I - S : I))...});
#endif
}

// In blocks of S x S, the upper right ones change places with the lower left ones; then within all of these.
template <class V, int L, int S> INLINE void exchange(V* rows) {
  if constexpr (S > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i)
      if (!(i & S)) {
        V a = rows[i], b = rows[i + S];
        rows[i] = exchanged<V, S, false>(a, b, std::make_integer_sequence<int, L>());
        rows[i + S] = exchanged<V, S, true>(a, b, std::make_integer_sequence<int, L>());
      }
    exchange<V, L, S / 2>(rows);
  }
}

// W x W numbers, whose columns become rows.
template <class T, int W> INLINE void transpose(const T* from, long across, T* to, long wide) {
  Vec<T, W> rows[W];
#pragma GCC unroll 16
  for (int j = 0; j < W; ++j) rows[j] = load(from + j * across, Full<W>{});
  exchange<Vec<T, W>, W, W / 2>(rows);
#pragma GCC unroll 16
  for (int l = 0; l < W; ++l) store(to + l * wide, rows[l], Full<W>{});
}

// The panel that begins at column c.
template <class T> static void pack(const Weight<T>& weight, long c) {
  constexpr int W = width<T>(), P = panel<T>();
  const long down = weight.down, across = weight.across, k = weight.k;
  long left = weight.n - c < P ? weight.n - c : P, wide = (left + W - 1) / W * W;
  const T* from = weight.w + c * across;
  T* to = weight.packed + c * k;
  for (long i = 0; i < k; i += W, to += W * wide) {  // blocks of W x wide, read along the axis that is contiguous
    long deep = k - i < W ? k - i : W;
    if (left < wide) memset(to, 0, deep * wide * sizeof(T));
    if (down == 1) {
      long whole = deep == W ? left / W * W : 0;
      for (long j = 0; j < whole; j += W) transpose<T, W>(from + i + j * across, across, to + j, wide);
      for (long j = whole; j < left; ++j)
        for (long l = 0; l < deep; ++l) to[l * wide + j] = from[i + l + j * across];
    } else {
      for (long l = 0; l < deep; ++l)
        for (long j = 0; j < left; ++j) to[l * wide + j] = from[(i + l) * down + j * across];
    }
  }
}

template <class T> static void pack_panel(void* weight, long number, const Member&) {
  pack(*(const Weight<T>*)weight, number * panel<T>());
}

// k is taken in pieces whose panel fits in the first cache; the sums pass through `out`, which changes no bit of them.
constexpr long kDepth = 24 * 1024 / (kRegister * kVectors);

template <class T, int R, int V, bool FAR>
static __attribute__((noinline)) void block(const T* a, long a_stride, const T* w, long k, T* out, long out_stride, long columns, bool first, const T* bias, const char* ahead, long stride) {
  constexpr int W = width<T>();
  typedef Vec<T, W> F;
  F sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const T* from = first ? bias + v * W : out + r * out_stride + v * W;
      if (first && !bias) sum[r][v] = F{};
      else if (v < V - 1 || columns == V * W) sum[r][v] = load(from, Full<W>{});
      else sum[r][v] = load(from, Part<W>{columns - v * W});
    }
  for (long i = 0; i < k; ++i, w += V * W, ahead += stride) {
    if (FAR) __builtin_prefetch(ahead, 0, 2);
    F x[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) x[v] = load(w + v * W, Full<W>{});
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      F b = every<W>(a[r * a_stride + i]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] = R * V == 1 ? fused(sum[r][v], b, x[v]) : sum[r][v] + b * x[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      T* to = out + r * out_stride + v * W;
      if (v < V - 1 || columns == V * W) store(to, sum[r][v], Full<W>{});
      else store(to, sum[r][v], Part<W>{columns - v * W});
    }
}

template <class T, int V, bool FAR>
static void panel_rows(const T* a, long a_stride, long rows, const T* w, long k, T* out, long out_stride, long columns, bool first, const T* bias) {
  long blocks = (rows + kRows - 1) / kRows;
  // FAR: weights beyond the second cache, whose next part comes nearer with every block.
  const char* ahead = (const char*)(w + k * V * width<T>());
  const long stride = V * width<T>() * sizeof(T) / blocks;
  for (long b = 0, done = 0; b < blocks; ++b) {
    long now = (rows - done + (blocks - b) - 1) / (blocks - b);
    const T* from = a + done * a_stride;
    T* to = out + done * out_stride;
    switch (now) {
      case 1: block<T, 1, V, FAR>(from, a_stride, w, k, to, out_stride, columns, first, bias, ahead, stride); break;
      case 2: block<T, 2, V, FAR>(from, a_stride, w, k, to, out_stride, columns, first, bias, ahead, stride); break;
      case 3: block<T, 3, V, FAR>(from, a_stride, w, k, to, out_stride, columns, first, bias, ahead, stride); break;
      case 4: block<T, 4, V, FAR>(from, a_stride, w, k, to, out_stride, columns, first, bias, ahead, stride); break;
#if defined(__AVX__)
      case 5: block<T, 5, V, FAR>(from, a_stride, w, k, to, out_stride, columns, first, bias, ahead, stride); break;
      case 6: block<T, 6, V, FAR>(from, a_stride, w, k, to, out_stride, columns, first, bias, ahead, stride); break;
#endif
    }
    done += now;
    ahead += stride * k;
  }
}

// Panels from..stop of the columns; bias (n): null for none.
template <class T>
static void multiply_packed(const T* a, long a_stride, long rows, const T* w, long k, long n, T* out, long out_stride, long from, long stop, const T* bias) {
  constexpr int W = width<T>(), P = panel<T>();
  const bool far = n * k * (long)sizeof(T) > (1 << 18);
  w += from * P * k;
  for (long c = from * P; c < stop * P && c < n; c += P) {
    long columns = n - c < P ? n - c : P, vectors = (columns + W - 1) / W;
    for (long i = 0; i == 0 || i < k; i += kDepth) {  // once where k is 0: then the sums are the bias
      long depth = k - i < kDepth ? k - i : kDepth;
      const T* part = w + i * vectors * W;
      if (far && vectors == kVectors) {
        panel_rows<T, kVectors, true>(a + i, a_stride, rows, part, depth, out + c, out_stride, columns, i == 0, bias ? bias + c : 0);
        continue;
      }
      switch (vectors) {
        case 1: panel_rows<T, 1, false>(a + i, a_stride, rows, part, depth, out + c, out_stride, columns, i == 0, bias ? bias + c : 0); break;
        case 2: panel_rows<T, 2, false>(a + i, a_stride, rows, part, depth, out + c, out_stride, columns, i == 0, bias ? bias + c : 0); break;
#if defined(__AVX512F__)
        case 3: panel_rows<T, 3, false>(a + i, a_stride, rows, part, depth, out + c, out_stride, columns, i == 0, bias ? bias + c : 0); break;
        case 4: panel_rows<T, 4, false>(a + i, a_stride, rows, part, depth, out + c, out_stride, columns, i == 0, bias ? bias + c : 0); break;
#endif
      }
    }
    w += vectors * W * k;
  }
}

// out[c] = a . column c, for C columns whose numbers are contiguous: several sums under way at once.
template <class T, int C>
INLINE void dot_columns(const T* a, const T* w, long across, long k, T* out) {
  constexpr int W = width<T>();
  typedef Vec<T, W> F;
  F sum[C] = {};
  long l = 0;
  for (; l + W <= k; l += W) {
    F x = load(a + l, Full<W>{});
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[c] = fused(sum[c], x, load(w + c * across + l, Full<W>{}));
  }
  if (l < k) {
    Part<W> m{k - l};
    F x = load(a + l, m);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[c] = fused(sum[c], x, load(w + c * across + l, m));
  }
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) out[c] = total(sum[c]);
}

// For so few rows that packing would cost more than it saves. Columns together: vectors along n, sums in the order of
// `block`. Rows together (a transposed weight): vectors along k, so that sums are in another order.
template <class T>
static void multiply_once(const T* a, const T* w, long down, long across, long k, long n, T* out) {
  constexpr int W = width<T>();
  typedef Vec<T, W> F;
  if (down == 1) {
    long j = 0;
    for (; j + 4 <= n; j += 4) dot_columns<T, 4>(a, w + j * across, across, k, out + j);
    for (; j < n; ++j) dot_columns<T, 1>(a, w + j * across, across, k, out + j);
  } else if (across == 1) {
    span<4 * W>(n, [&](long j, auto m) ALWAYS {
      F sum[4] = {};
      for (long i = 0; i < k; ++i) {
        F x = every<W>(a[i]);
        const T* row = w + i * down + j;
        for (int v = 0; v < 4; ++v) {
          long left = count_of(m) - v * W;
          if (left >= W) sum[v] = fused(sum[v], x, load(row + v * W, Full<W>{}));
          else if (left > 0) sum[v] = fused(sum[v], x, load(row + v * W, Part<W>{left}));
        }
      }
      for (int v = 0; v < 4; ++v) {
        long left = count_of(m) - v * W;
        if (left >= W) store(out + j + v * W, sum[v], Full<W>{});
        else if (left > 0) store(out + j + v * W, sum[v], Part<W>{left});
      }
    });
  } else {
    for (long j = 0; j < n; ++j) {
      T sum = 0;
      for (long i = 0; i < k; ++i) sum += a[i] * w[i * down + j * across];
      out[j] = sum;
    }
  }
}

constexpr long kAlone = 1 << 17;  // bytes that one thread packs before others are there

template <class T> static void prepare(Weight<T>& weight, bool pack_it, long threads, Parallel parallel) {
  weight.packed = 0;
  if (!pack_it) return;
  const long bytes = packed_size<T>(weight.k, weight.n) * sizeof(T);
  weight.packed = (T*)aligned_alloc(64, (bytes + 127) / 64 * 64);
  run_tiles(pack_panel<T>, &weight, (weight.n + panel<T>() - 1) / panel<T>(), bytes < kAlone ? 1 : threads, 0, parallel);
}

// See product.h; bias (n): null for none. A team shares the panels of columns.
template <class T>
static void product(const T* a, long a_stride, long rows, const Weight<T>& weight, const T* bias, T* out, long out_stride, const Member& team) {
  constexpr int P = panel<T>();
  const long k = weight.k, n = weight.n, panels = (n + P - 1) / P, from = team.share(panels), stop = team.share(panels, 1);
  if (weight.packed) return multiply_packed(a, a_stride, rows, (const T*)weight.packed, k, n, out, out_stride, from, stop, bias);
  const long first = from * P, last = stop * P < n ? stop * P : n;
  for (long r = 0; r < rows; ++r) {
    multiply_once(a + r * a_stride, weight.w + first * weight.across, weight.down, weight.across, k, last - first, out + r * out_stride + first);
    for (long j = first; bias && j < last; ++j) out[r * out_stride + j] += bias[j];
  }
}

// A product of its own, for many rows at once: out = a @ weight + bias. The weight is packed as for a loop.
constexpr long kBand = 64;  // rows whose part of everything stays in the second cache
template <class T> struct LongProduct {
  const T *a, *bias;
  T* out;
  long rows, a_stride, tile;
  Weight<T> weight;
};

template <class T> static void product_tile(void* given, long tile, const Member&) {
  const LongProduct<T>& call = *(const LongProduct<T>*)given;
  const long n = call.weight.n, panels = (n + panel<T>() - 1) / panel<T>(), size = call.a_stride * sizeof(T);
  const long end = call.rows < (tile + 1) * call.tile ? call.rows : (tile + 1) * call.tile;
  for (long start = tile * call.tile; start < end; start += kBand) {
    const long rows = end - start < kBand ? end - start : kBand, next = end - start - rows < kBand ? end - start - rows : kBand;
    const T* a = call.a + start * call.a_stride;
    const char* ahead = (const char*)(a + rows * call.a_stride);
    for (long p = 0; p < panels; ++p) {  // with every panel, a part of the next rows comes nearer
      for (long at = next * size * p / panels / 64 * 64; at < next * size * (p + 1) / panels; at += 64) __builtin_prefetch(ahead + at, 0, 2);
      multiply_packed(a, call.a_stride, rows, (const T*)call.weight.packed, call.weight.k, n, call.out + start * n, n, p, p + 1, call.bias);
    }
  }
}

// pointers: a, w, bias (null: none), out.  numbers: rows, k, n, strides of a's rows and of w, threads.
template <class T> static void long_product(void** pointers, const i64* numbers, Parallel parallel) {
  LongProduct<T> call = {(const T*)pointers[0], (const T*)pointers[2], (T*)pointers[3], numbers[0], numbers[3], 4 * kBand,
                         {0, (const T*)pointers[1], numbers[4], numbers[5], numbers[1], numbers[2], 0}};
  prepare(call.weight, true, numbers[6], parallel);
  run_tiles(product_tile<T>, &call, (call.rows + call.tile - 1) / call.tile, numbers[6], 0, parallel);
  free(call.weight.packed);
}

extern "C" __attribute__((visibility("default"))) const Products<NUMBER> steploop_products = {prepare<NUMBER>, product<NUMBER>};

// Where vectors are wide enough to be worth it, products outside the loops run in the same way.
#if defined(__AVX2__)
extern "C" __attribute__((visibility("default"))) void steploop_product(void** pointers, const i64* numbers, Parallel parallel) {
  long_product<NUMBER>(pointers, numbers, parallel);
}
#endif
