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
          copy(c_tile + r * scratch.c_row, call.to_c + (row0 + r) * 6, 6);
        }
    team.wait();
    multiply(h_tile + 0 * scratch.h_row + 0, scratch.h_row, n, call.weight0_captured_0, mm_default_tile, scratch.mm_default_row, team);  // test_cpu_golden.py:30
    team.wait();
    for (long r = from; r < end; ++r) {
      const float* x_x0 = call.x_x0 + (call.x_x0_at ? call.x_x0_at[at + r] : here + r) * 24;
      const float* mm_default = mm_default_tile + r * scratch.mm_default_row;
      const float* c = c_tile + r * scratch.c_row;
      float* next_h = h_tile + r * scratch.h_row;
      float* next_c = c_tile + r * scratch.c_row;
      float* all_mul_tensor_2 = call.all_mul_tensor_2 + (call.all_mul_tensor_2_at ? call.all_mul_tensor_2_at[at + r] : here + r) * 6;
      // 6: test_cpu_golden.py:31, test_cpu_golden.py:32
      span<W8>(6, [&](long i, auto m) ALWAYS {
        auto x_x0_i = load(x_x0 + 6 + i, m);
        auto mm_default_i = load(mm_default + 6 + i, m);
        auto add_tensor = x_x0_i + mm_default_i;
        auto sigmoid_default = sigmoid(add_tensor);
        auto c_i = load(c + i, m);
        auto mul_tensor = sigmoid_default * c_i;
        auto x_x0_i_2 = load(x_x0 + i, m);
        auto mm_default_i_2 = load(mm_default + i, m);
        auto add_tensor_2 = x_x0_i_2 + mm_default_i_2;
        auto sigmoid_default_1 = sigmoid(add_tensor_2);
        auto x_x0_i_3 = load(x_x0 + 12 + i, m);
        auto mm_default_i_3 = load(mm_default + 12 + i, m);
        auto add_tensor_3 = x_x0_i_3 + mm_default_i_3;
        auto tanh_default = hyperbolic_tangent(add_tensor_3);
        auto mul_tensor_1 = sigmoid_default_1 * tanh_default;
        auto add_tensor_1 = mul_tensor + mul_tensor_1;
        auto x_x0_i_4 = load(x_x0 + 18 + i, m);
        auto mm_default_i_4 = load(mm_default + 18 + i, m);
        auto add_tensor_4 = x_x0_i_4 + mm_default_i_4;
        auto sigmoid_default_2 = sigmoid(add_tensor_4);
        auto tanh_default_1 = hyperbolic_tangent(add_tensor_1);
        auto mul_tensor_2 = sigmoid_default_2 * tanh_default_1;
        store(next_h + i, mul_tensor_2, m);
        store(next_c + i, add_tensor_1, m);
        store(all_mul_tensor_2 + i, mul_tensor_2, m);
      });
    }
    if (call.resets && call.down)
      for (long r = from; r < end; ++r)
        if (call.resets[at + r]) {
          copy(h_tile + r * scratch.h_row, call.to_h + (row0 + r) * 6, 6);
          copy(c_tile + r * scratch.c_row, call.to_c + (row0 + r) * 6, 6);
        }
  }
