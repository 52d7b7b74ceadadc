  auto make_early = [&](long step, long steps) {
    const Where first = where(step);
    const bool together = steps == 1 || (rows == call.batch && !call.down);  // nothing between the rows
    long count = 0;
    for (long s = step; s < step + steps; ++s) {
      const Where w = where(s);
      if (!together || call.x_x0_at)
        for (long r = team.share(w.n); r < team.share(w.n, 1); ++r)
          copy(rows0_x_x0_tile + (count + r) * scratch.rows0_x_x0_row, call.x_x0 + (call.x_x0_at ? call.x_x0_at[w.at + r] : w.here + r) * 4 + 0, 4);
      count += w.n;
    }
    if (!count) return;
    team.wait();
    multiply(!together || call.x_x0_at ? rows0_x_x0_tile : call.x_x0 + first.here * 4 + 0, !together || call.x_x0_at ? scratch.rows0_x_x0_row : 4, count, call.weight1_captured_0, mm_default_early, scratch.mm_default_row, team);  // test_cpu_golden.py:82
    team.wait();
  };
  long early = 0, used = 0;
  long loaded = 0;
  for (long step = 0; step < call.stop - call.start; ++step) {
    const Where now = where(step);
    const long p = now.p, n = now.n, at = now.at, here = now.here;
    if (!early) {
      early = call.stop - call.start - step < call.ahead ? call.stop - call.start - step : call.ahead;
      used = 0;
      make_early(step, early);
    }
    float* mm_default_tile = mm_default_early + used * scratch.mm_default_row;
    --early, used += n;
    const Where next = !early && step + 1 < call.stop - call.start ? where(step + 1) : Where{};
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
    multiply(h_tile + 0 * scratch.h_row + 0, scratch.h_row, n, call.weight0_captured_1, mm_default_1_tile, scratch.mm_default_1_row, team);  // test_cpu_golden.py:82
    team.wait();
    for (long r = from; r < end; ++r) {
      const float* mm_default = mm_default_tile + r * scratch.mm_default_row;
      const float* mm_default_1 = mm_default_1_tile + r * scratch.mm_default_1_row;
      float* next_h = h_tile + r * scratch.h_row;
      float* all_tanh_default = call.all_tanh_default + (call.all_tanh_default_at ? call.all_tanh_default_at[at + r] : here + r) * 6;
      if (r < next.n) nearer(call.x_x0 + (call.x_x0_at ? call.x_x0_at[next.at + r] : next.here + r) * 4 + 0, 4 * sizeof(float));
      // 6: test_cpu_golden.py:82
      span<W8>(6, [&](long i, auto m) ALWAYS {
        auto mm_default_i = load(mm_default + i, m);
        auto mm_default_1_i = load(mm_default_1 + i, m);
        auto add_tensor = mm_default_i + mm_default_1_i;
        auto tanh_default = hyperbolic_tangent(add_tensor);
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
