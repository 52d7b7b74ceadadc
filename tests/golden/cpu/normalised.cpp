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
          copy(h_tile + r * scratch.h_row, call.to_h + (row0 + r) * 6, 6);
        }
    team.wait();
    multiply(h_tile + 0 * scratch.h_row + 0, scratch.h_row, n, call.weight0_captured_0, mm_default_tile, scratch.mm_default_row, team);  // test_cpu_golden.py:42
    team.wait();
    for (long r = from; r < end; ++r) {
      const float* x_x0 = call.x_x0 + (call.x_x0_at ? call.x_x0_at[at + r] : here + r) * 6;
      const float* mm_default = mm_default_tile + r * scratch.mm_default_row;
      float* native_layer_norm_default = native_layer_norm_default_tile;
      float* native_layer_norm_default_2 = native_layer_norm_default_2_tile;
      float* mean = mean_tile;
      float* native_layer_norm_default_3 = native_layer_norm_default_3_tile;
      float* rstd = rstd_tile;
      const float* captured_1 = call.captured_1;
      float* next_h = h_tile + r * scratch.h_row;
      float* all_tanh_default = call.all_tanh_default + (call.all_tanh_default_at ? call.all_tanh_default_at[at + r] : here + r) * 6;
      // 6: test_cpu_golden.py:42
      {
        auto sum_native_layer_norm_default_2 = every<W8>((float)0);
        span<W8>(6, [&](long i, auto m) ALWAYS {
          auto x_x0_i = load(x_x0 + i, m);
          auto mm_default_i = load(mm_default + i, m);
          auto add_tensor = x_x0_i + mm_default_i;
          store(native_layer_norm_default + i, add_tensor, m);
          sum_native_layer_norm_default_2 = sum_native_layer_norm_default_2 + only(m, add_tensor, every<W8>((float)0));
        });
        put(native_layer_norm_default_2 + 0, total(sum_native_layer_norm_default_2));
      }
      // 1: test_cpu_golden.py:42
      span<W4>(1, [&](long i, auto m) ALWAYS {
        auto native_layer_norm_default_2_i = every<W4>((native_layer_norm_default_2 + 0)[0]);
        auto x = counting<W4>(6, 0);
        auto x_2 = convert<float>(x);
        auto x_3 = native_layer_norm_default_2_i / x_2;
        store(mean + 0, x_3, m);
      });
      // 6: test_cpu_golden.py:42
      {
        auto sum_native_layer_norm_default_3 = every<W8>((float)0);
        span<W8>(6, [&](long i, auto m) ALWAYS {
          auto native_layer_norm_default_i = load(native_layer_norm_default + i, m);
          auto mean_i = every<W8>((mean + 0)[0]);
          auto x = native_layer_norm_default_i - mean_i;
          auto x_2 = x * x;
          sum_native_layer_norm_default_3 = sum_native_layer_norm_default_3 + only(m, x_2, every<W8>((float)0));
        });
        put(native_layer_norm_default_3 + 0, total(sum_native_layer_norm_default_3));
      }
      // 1: test_cpu_golden.py:42
      span<W4>(1, [&](long i, auto m) ALWAYS {
        auto native_layer_norm_default_3_i = every<W4>((native_layer_norm_default_3 + 0)[0]);
        auto x = counting<W4>(6, 0);
        auto x_2 = convert<float>(x);
        auto x_3 = native_layer_norm_default_3_i / x_2;
        auto x_4 = every<W4>((float)1e-05f);
        auto x_5 = x_3 + x_4;
        auto x_6 = reciprocal_root(x_5);
        store(rstd + 0, x_6, m);
      });
      // 6: test_cpu_golden.py:42
      span<W8>(6, [&](long i, auto m) ALWAYS {
        auto native_layer_norm_default_i = load(native_layer_norm_default + i, m);
        auto mean_i = every<W8>((mean + 0)[0]);
        auto x = native_layer_norm_default_i - mean_i;
        auto rstd_i = every<W8>((rstd + 0)[0]);
        auto x_2 = x * rstd_i;
        auto captured_1_i = load(captured_1 + i, m);
        auto getitem = x_2 * captured_1_i;
        auto tanh_default = hyperbolic_tangent(getitem);
        store(next_h + i, tanh_default, m);
        store(all_tanh_default + i, tanh_default, m);
      });
    }
    if (call.resets && call.down)
      for (long r = from; r < end; ++r)
        if (call.resets[at + r]) {
          copy(h_tile + r * scratch.h_row, call.to_h + (row0 + r) * 6, 6);
        }
  }
