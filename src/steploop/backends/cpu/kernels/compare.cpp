// Compares memory for guards (compiler/words.py), and keeps the rows of a streamed step that take no part in it.
// It also tries the compiler out: whatever else kernels include must be there.
#define _GLIBCXX_INCLUDE_NEXT_C_HEADERS  // see vector.h
#include <math.h>
#include <pthread.h>
#include <string.h>
#include <type_traits>
#include <utility>

using word = unsigned long long;
static_assert(std::is_same<word, unsigned long long>::value && sizeof(word) == 8, "a word has 8 bytes");

#define VISIBLE extern "C" __attribute__((visibility("default")))

VISIBLE float steploop_trial(float x) { return expf(x); }

// table: three words an entry: an address, the word that is to stand there, 0; or two addresses and a number of bytes.
// The first entry from `start` on that differs, -1: none. An entry may hold an address that an earlier one has checked.
VISIBLE long steploop_differs(const word* table, long start, long count) {
  for (long i = start; i < count; ++i) {
    const word* entry = table + 3 * i;
    const bool differs = entry[2] ? memcmp((const void*)entry[0], (const void*)entry[1], entry[2]) != 0
                                  : *(const word*)entry[0] != entry[1];
    if (differs) return i;
  }
  return -1;
}

// table: three words an entry: where rows stand, where those stand that they are to be (0: zeros), bytes of a row.
// The rows that `mask` leaves out are put back.
VISIBLE void steploop_put_back(const unsigned char* mask, long rows, const word* table, long count) {
  for (long row = 0; row < rows; ++row) {
    if (mask[row]) continue;
    for (long i = 0; i < count; ++i) {
      const word* entry = table + 3 * i;
      char* to = (char*)entry[0] + row * entry[2];
      if (entry[1]) memcpy(to, (const char*)entry[1] + row * entry[2], entry[2]);
      else memset(to, 0, entry[2]);
    }
  }
}
