// Products of a tile of rows with weights that stand still. Every warp of a team has columns of its own; a block keeps the
// columns of its warps in its own memory, where there is room, for all steps.

template <class T> struct Products {};

// A weight (k, n): where it is, and its columns from `first` on in the block's memory, `pitch` numbers apart (or null).
template <class T> struct Weight {
  const Products<T>* by;
  const T* w;
  long down, across, k, n;
  const T* packed;
  long first, pitch;

  // With 16 bytes between columns, lanes that read the same place of several columns read other banks of memory.
  INLINE_MEMBER static long pitch_of(long k) { return k + 16 / (long)sizeof(T); }

  // Copies the columns of this block into its memory, if they fit between `room` and `end`.
  INLINE_MEMBER void bring_near(const Member& team, char*& room, char* end) {
    first = team.share_of_block(n, 0);
    const long columns = team.share_of_block(n, 1) - first;
    pitch = pitch_of(k);
    const long bytes = (columns * pitch * (long)sizeof(T) + 15) / 16 * 16;
    if (bytes == 0 || bytes > end - room) return;
    T* const to = (T*)room;
    room += bytes;
    for (long i = thread_of_block(); i < columns * k; i += threads_of_block()) {
      // threads side by side read numbers side by side
      const long c = down == 1 ? i / k : i % columns, at = down == 1 ? i % k : i / columns;
      to[c * pitch + at] = w[at * down + (first + c) * across];
    }
    packed = to;
  }
};

// Sums of N numbers over all lanes, in halves: lanes send each other what the other adds up. A lane then has the sums
// from number `begin` on, as many as it returns; 0 where another lane has the same.
template <int N, int APART_BY, class T> INLINE int add_up(T* sums, int& begin) {
  if constexpr (APART_BY == 0) {
    return N;
  } else if constexpr (N == 1) {
    sums[0] += from_lane(sums[0], lane() ^ APART_BY);
    const int count = add_up<1, APART_BY / 2>(sums, begin);
    return lane() & APART_BY ? 0 : count;
  } else {
    const bool upper = lane() & APART_BY;
    for (int i = 0; i < N / 2; ++i) {
      const T mine = upper ? sums[N / 2 + i] : sums[i], other = upper ? sums[i] : sums[N / 2 + i];
      sums[i] = mine + from_lane(other, lane() ^ APART_BY);
    }
    begin += upper ? N / 2 : 0;
    return add_up<N / 2, APART_BY / 2>(sums, begin);
  }
}

// Lanes along k, ROWS rows and COLUMNS columns at a time: for weights whose columns stand one number after the other.
// T is what is computed with, W what the weight is kept in.
template <int ROWS, int COLUMNS, class T, class W>
INLINE void along_k(const T* a, long a_stride, long rows, const W* w, long apart, long k, long columns, T* out, long out_stride) {
  for (long c = 0; c < columns; c += COLUMNS)
    for (long r = 0; r < rows; r += ROWS) {
      T sums[ROWS * COLUMNS] = {};
      for (long i = lane(); i < k; i += WARP) {
        T left[ROWS];
        for (int x = 0; x < ROWS; ++x) left[x] = a[(r + x < rows ? r + x : rows - 1) * a_stride + i];
        for (int y = 0; y < COLUMNS; ++y) {
          const T right = (T)w[(c + y < columns ? c + y : columns - 1) * apart + i];
          for (int x = 0; x < ROWS; ++x) sums[x * COLUMNS + y] += left[x] * right;
        }
      }
      int begin = 0;
      const int count = add_up<ROWS * COLUMNS, WARP / 2>(sums, begin);
      for (int i = 0; i < count; ++i) {
        const long row = r + (begin + i) / COLUMNS, column = c + (begin + i) % COLUMNS;
        if (row < rows && column < columns) out[row * out_stride + column] = sums[i];
      }
    }
}

// Lanes along the columns, ROWS rows at a time: for weights whose rows stand one number after the other.
template <int ROWS, class T, class W>
INLINE void along_n(const T* a, long a_stride, long rows, const Weight<W>& w, T* out, long out_stride, const Member& team) {
  const long wide = (w.n + WARP - 1) / WARP, all = wide * ((rows + ROWS - 1) / ROWS);
  for (long part = team.share(all); part < team.share(all, 1); ++part) {
    const long r = part / wide * ROWS, c = part % wide * WARP + lane();
    if (c >= w.n) continue;
    T sums[ROWS] = {};
    for (long i = 0; i < w.k; ++i) {
      const T right = (T)w.w[i * w.down + c * w.across];
      for (int x = 0; x < ROWS; ++x) sums[x] += a[(r + x < rows ? r + x : rows - 1) * a_stride + i] * right;
    }
    for (int x = 0; x < ROWS; ++x)
      if (r + x < rows) out[(r + x) * out_stride + c] = sums[x];
  }
}

// Two numbers of a row as halves side by side, as tensor cores read them; what is beyond k is zero.
template <class W, class A> INLINE unsigned pair_of(const A* row, long i, long k) {
  const unsigned low = i < k ? W((float)row[i]).bits : 0, high = i + 1 < k ? W((float)row[i + 1]).bits : 0;
  return low | high << 16;
}

// On tensor cores: the warps of a block take tiles of 16 rows and 8 of its columns. w: the first of these.
template <class W>
INLINE void by_tiles(const float* a, long a_stride, long rows, const W* w, long apart, long k, long columns, float* out, long out_stride, const Member& team) {
  const long across = (columns + 7) / 8, all = across * ((rows + 15) / 16);
  const int group = lane() / 4, in_group = lane() % 4;
  for (long tile = team.warp_of_block(); tile < all; tile += threads_of_block() / WARP) {
    const long r = tile / across * 16, c = tile % across * 8;
    const float* upper = a + (r + group < rows ? r + group : rows - 1) * a_stride;
    const float* lower = a + (r + group + 8 < rows ? r + group + 8 : rows - 1) * a_stride;
    const W* column = w + (c + group < columns ? c + group : columns - 1) * apart;
    float sums[4] = {};
    for (long i = 2 * in_group; i < k + 2 * in_group; i += 16) {
      const unsigned left[4] = {pair_of<W>(upper, i, k), pair_of<W>(lower, i, k), pair_of<W>(upper, i + 8, k), pair_of<W>(lower, i + 8, k)};
      const unsigned right[2] = {pair_of<W>(column, i, k), pair_of<W>(column, i + 8, k)};
      multiply_add<Half<W>::brain>(sums, left, right);
    }
    for (int i = 0; i < 4; ++i) {
      const long row = r + group + i / 2 * 8, place = c + 2 * in_group + i % 2;
      if (row < rows && place < columns) out[row * out_stride + place] = sums[i];
    }
  }
}

// out[r, :n] = a[r, :k] @ weight for all rows of a tile; the team shares the columns.
template <class T, class W>
INLINE void multiply(const T* a, long a_stride, long rows, const Weight<W>& w, T* out, long out_stride, const Member& team) {
  if (rows <= 0) return;
  if constexpr (Half<W>::is && WARP == 32) {
    if (rows >= 8 && (w.packed || w.down == 1)) {
      const long first = team.share_of_block(w.n, 0), columns = team.share_of_block(w.n, 1) - first;
      const W* begin = w.packed ? w.packed : w.w + first * w.across;
      return by_tiles(a, a_stride, rows, begin, w.packed ? w.pitch : w.across, w.k, columns, out + first, out_stride, team);
    }
  }
  if (!w.packed && w.down != 1) return along_n<8>(a, a_stride, rows, w, out, out_stride, team);
  const long c = team.share(w.n), columns = team.share(w.n, 1) - c;
  const long apart = w.packed ? w.pitch : w.across;
  const W* columns_of_warp = w.packed ? w.packed + (c - w.first) * w.pitch : w.w + c * w.across;
  if (rows == 1) along_k<1, 8>(a, a_stride, rows, columns_of_warp, apart, w.k, columns, out + c, out_stride);
  else if (columns <= 2) along_k<8, 2>(a, a_stride, rows, columns_of_warp, apart, w.k, columns, out + c, out_stride);
  else along_k<8, 4>(a, a_stride, rows, columns_of_warp, apart, w.k, columns, out + c, out_stride);
}

// The same for each of `count` matrices of `rows` rows, `apart` numbers from one to the next.
template <class T, class W>
INLINE void multiply_each(const T* a, long apart, long a_stride, long rows, long count, const Weight<W>& w, T* out, long out_apart, long out_stride, const Member& team) {
  if (apart == rows * a_stride && out_apart == rows * out_stride) return multiply(a, a_stride, rows * count, w, out, out_stride, team);
  for (long i = 0; i < count; ++i) multiply(a + i * apart, a_stride, rows, w, out + i * out_apart, out_stride, team);
}
