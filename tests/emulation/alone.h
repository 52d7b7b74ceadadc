// A program of one launch, for checkers that want a process of their own. Its argument is a file: 64-bit numbers of how many
// words, the bytes of the temporaries and of a block's own memory, how many teams, whether together, blocks and warps; then for
// every word its size in bytes and what it points to, or -1 and the word itself.
#include <stdio.h>

static i64 next_number(FILE* file) {
  i64 x;
  if (fread(&x, sizeof x, 1, file) != 1) abort();
  return x;
}

int main(int, char** arguments) {
  FILE* const file = fopen(arguments[1], "rb");
  i64 head[7], words[Call::kPointers + Call::kNumbers];
  for (i64& x : head) x = next_number(file);
  if (head[0] != Call::kPointers + Call::kNumbers) abort();
  for (i64& word : words) {
    const i64 bytes = next_number(file);
    if (bytes < 0) {
      word = next_number(file);
      continue;
    }
    char* const memory = (char*)malloc(bytes + 1);
    if ((i64)fread(memory, 1, bytes, file) != bytes) abort();
    word = (i64)memory;
  }
  Barrier barrier = {0, 0};
  steploop_run(words, (char*)calloc(1, head[1] * head[3] + 1), head[1], &barrier, head[4], head[2], head[5], head[6]);
}
