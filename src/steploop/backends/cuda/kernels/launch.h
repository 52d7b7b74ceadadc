extern "C" __global__ void __launch_bounds__(256, 1) steploop_run(const __grid_constant__ Given given, char* memory, i64 bytes, Barrier* barrier, i64 together, i64 near_bytes) {
  run_call(given, memory, bytes, barrier, together, near_bytes);
}
