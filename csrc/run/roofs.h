// Measures the machine's memory bandwidth and matrix FLOP/s: the rooflines with which step times are compared.
#pragma once
#include "isa/kernels.h"
#include "pack/format.h"

namespace intaglio {

// Bytes/s of a streaming read of `megabytes` MiB split among `threads` threads; the best of `runs` passes.
double read_bandwidth(int threads, int megabytes, int runs, const Kernels& kernels);
// FLOP/s of the linear kernel on operands that stay in cache, an upper bound for real products; the best of `runs` passes.
double matrix_peak(int threads, const Format& format, int group, int runs, const Kernels& kernels);

}  // namespace intaglio
