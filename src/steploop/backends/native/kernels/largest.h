// Whether a number comes before another in falling order. NaN is the largest.
template <class T> INLINE bool comes_before(T a, T b) { return a > b || (a != a && b == b); }

// out: the places of the `count` largest of n numbers in falling order, of equal ones the first.
template <long count, class T> static void largest_places(i64* out, const T* a, long, long across, long n) {
  T held[count];
  long have = 0;
  for (long i = 0; i < n; ++i) {
    if (across == 1 && have == count)
      for (; i + 16 <= n; i += 16) {  // most numbers are too small: sixteen at a time are passed over
        bool found = false;
        for (long j = 0; j < 16; ++j) found |= !(a[i + j] <= held[count - 1]);
        if (found) break;
      }
    if (i >= n) break;
    const T x = a[i * across];
    if (have == count && !comes_before(x, held[count - 1])) continue;
    long at = have < count ? have++ : count - 1;
    for (; at > 0 && comes_before(x, held[at - 1]); --at) held[at] = held[at - 1], out[at] = out[at - 1];
    held[at] = x, out[at] = i;
  }
}
