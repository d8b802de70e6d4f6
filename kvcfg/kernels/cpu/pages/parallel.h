// Work split over threads: those of torch's OpenMP where it was found, else a pool of this library.

#pragma once

#include <cstdint>

namespace kvcfg {

// Calls body(context, item) once for each item of 0..count-1, on up to `threads` threads, and returns when all are
// done. Which thread takes which item is decided as they run. Safe from several threads at once, from inside a
// body (it then runs on that thread alone), and in a child after a fork. A body must not throw: that ends the
// process.
void parallel_for(int64_t count, int64_t threads, void (*body)(void* context, int64_t item),
                  void* context) noexcept;

}  // namespace kvcfg

// The address of GOMP_parallel in the OpenMP library that torch runs on; null for this library's own pool.
extern "C" void kvcfg_share_threads(void* gomp_parallel);
