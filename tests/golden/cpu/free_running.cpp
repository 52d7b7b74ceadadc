  for (long step = 0; step < call.stop - call.start; ++step) {
    const Where now = where(step);
    const long p = now.p, n = now.n, at = now.at, here = now.here;
    if (n != loaded) {
      team.wait();
      save_rows(n, loaded), load_rows(loaded, n);
      team.wait();
      loaded = n;
    }
    if (n == 0) continue;
    const long from = team.share(n), end = team.share(n, 1);  // rows of this thread
    if (call.resets && !call.down)
      for (long r = from; r < end; ++r)
        if (call.resets[at + r]) {
          copy(token_tile + r * scratch.token_row, call.to_token + (row0 + r) * 1, 1);
          copy(h_tile + r * scratch.h_row, call.to_h + (row0 + r) * 6, 6);
        }
    for (long r = from; r < end; ++r) {
      const i64* token = token_tile + r * scratch.token_row;
      i64* index_ = index__tile;
      const float* h = h_tile + r * scratch.h_row;
      const float* captured_0 = call.captured_0;
      const float* x_x0 = call.x_x0 + (call.x_x0_at ? call.x_x0_at[at + r] : here + r) * 6;
      float* tanh_default = tanh_default_tile + r * scratch.tanh_default_row;
      float* next_h = h_tile + r * scratch.h_row;
      // 1: test_cpu_golden.py:68
      span<D4>(1, [&](long i, auto m) ALWAYS {
        auto token_i = every<D4>((token + 0)[0]);
        auto x = every<D4>((i64)7);
        auto x_2 = every<D4>((i64)1);
        auto x_3 = inside(token_i, x, x_2, call.fault, m);
        store(index_ + 0, x_3, m);
      });
      // 6: test_cpu_golden.py:68
      span<W8>(6, [&](long i, auto m) ALWAYS {
        auto h_i = load(h + i, m);
        auto captured_0_i = load(captured_0 + i + (index_ + 0)[0] * 6, m);
        auto add_tensor = h_i + captured_0_i;
        auto x_x0_i = load(x_x0 + i, m);
        auto add_tensor_1 = add_tensor + x_x0_i;
        auto tanh_default_2 = hyperbolic_tangent(add_tensor_1);
        store(tanh_default + i, tanh_default_2, m);
        store(next_h + i, tanh_default_2, m);
      });
    }
    team.wait();
    multiply(tanh_default_tile + 0 * scratch.tanh_default_row + 0, scratch.tanh_default_row, n, call.weight0_captured_0, mm_default_tile, scratch.mm_default_row, team);  // test_cpu_golden.py:69
    team.wait();
    for (long r = from; r < end; ++r) {
      const float* mm_default = mm_default_tile + r * scratch.mm_default_row;
      i64* argmax_default = argmax_default_tile;
      i64* next_token = token_tile + r * scratch.token_row;
      i64* all_argmax_default = call.all_argmax_default + (call.all_argmax_default_at ? call.all_argmax_default_at[at + r] : here + r) * 1;
      // 7: test_cpu_golden.py:69
      {
        auto argmax_argmax_default = every<W8>((float)0);
        auto argmax_argmax_default_at = every<W8>((i64)-1);
        span<W8>(7, [&](long i, auto m) ALWAYS {
          auto mm_default_i = load(mm_default + i, m);
          auto wins = only(m, better_max(mm_default_i, argmax_argmax_default) | less(argmax_argmax_default_at, every<W8>((i64)0)), every_mask<W8>(false));
          argmax_argmax_default = choose(wins, mm_default_i, argmax_argmax_default);
          argmax_argmax_default_at = choose(wins, counting<W8>(i, 1), argmax_argmax_default_at);
        });
        put(argmax_default + 0, first_best(argmax_argmax_default, argmax_argmax_default_at, true));
      }
      // 1: test_cpu_golden.py:69
      span<D4>(1, [&](long i, auto m) ALWAYS {
        auto argmax_default_i = every<D4>((argmax_default + 0)[0]);
        store(next_token + 0, argmax_default_i, m);
        store(all_argmax_default + 0, argmax_default_i, m);
      });
    }
    if (call.resets && call.down)
      for (long r = from; r < end; ++r)
        if (call.resets[at + r]) {
          copy(token_tile + r * scratch.token_row, call.to_token + (row0 + r) * 1, 1);
          copy(h_tile + r * scratch.h_row, call.to_h + (row0 + r) * 6, 6);
        }
  }
