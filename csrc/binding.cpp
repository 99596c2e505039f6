// The thin binding: arrays in, arrays out, the interpreter's lock released while a step runs.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <cstring>
#include <functional>
#include <map>
#include <optional>

#include "executable.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace intaglio {
namespace {

using Ints = nb::ndarray<const int32_t, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<float, nb::c_contig, nb::device::cpu>;

#if defined(INTAGLIO_HAVE_AVX2)
bool cpu_has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
#endif
#if defined(INTAGLIO_HAVE_AVX512)
bool cpu_has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vbmi");
}
#endif

// The instruction sets this build has and this machine runs, best first.
std::vector<std::string> isas() {
  std::vector<std::string> names;
#if defined(INTAGLIO_HAVE_AVX512)
  if (cpu_has_avx512()) names.push_back("avx512");
#endif
#if defined(INTAGLIO_HAVE_AVX2)
  if (cpu_has_avx2()) names.push_back("avx2");
#endif
  names.push_back("scalar");
  return names;
}

const Kernels* kernels_of(const std::string& isa) {
  for (const std::string& name : isas())
    if (name == isa) {
#if defined(INTAGLIO_HAVE_AVX512)
      if (isa == "avx512") return kernels_avx512();
#endif
#if defined(INTAGLIO_HAVE_AVX2)
      if (isa == "avx2") return kernels_avx2();
#endif
      return kernels_scalar();
    }
  throw std::invalid_argument("instruction set '" + isa + "' is not to be had on this machine");
}

template <class T>
T lookup(const std::map<std::string, T>& table, const std::string& name, const char* what) {
  auto at = table.find(name);
  if (at == table.end()) throw std::invalid_argument(std::string("unknown ") + what + " '" + name + "'");
  return at->second;
}

const std::map<std::string, Fmt> kFormats = {
    {"f32", Fmt::F32}, {"f16", Fmt::F16}, {"bf16", Fmt::BF16}, {"int8", Fmt::I8}, {"uint8", Fmt::U8},
    {"int4", Fmt::I4}, {"uint4", Fmt::U4}, {"mxfp4", Fmt::MX4}, {"q4_k", Fmt::K4}, {"q6_k", Fmt::K6}, {"fp8", Fmt::FP8}};
const std::map<std::string, Source> kSources = {{"f32", Source::F32}, {"f16", Source::F16}, {"bf16", Source::BF16}};
const std::map<std::string, Kind> kKinds = {
    {"embed", Kind::Embed}, {"select", Kind::Select}, {"permute", Kind::Permute}, {"norm", Kind::Norm},
    {"linear", Kind::Linear}, {"rope", Kind::Rope}, {"kv_write", Kind::KvWrite}, {"attend", Kind::Attend},
    {"map", Kind::Map}, {"sample", Kind::Sample}, {"route", Kind::Route}, {"experts", Kind::Experts},
    {"head_linear", Kind::HeadLinear}, {"exchange", Kind::Exchange}};

// A family of intaglio.formats: codes, "row" if a row has one scale, and what scales are kept in where it is not bf16.
Format format_of(const std::string& family) {
  if (auto plain = kFormats.find(family); plain != kFormats.end()) {
    const Fmt fmt = plain->second;
    return {fmt, fmt == Fmt::FP8 ? Scale::F32 : fmt == Fmt::K4 || fmt == Fmt::K6 ? Scale::F16 : Scale::BF16, false};
  }
  std::string name = family;
  auto drop = [&](const std::string& end) {
    const bool has = name.size() > end.size() && name.ends_with(end);
    if (has) name.resize(name.size() - end.size());
    return has;
  };
  const bool half = drop("f16"), single = !half && drop("f32"), row = drop("row");
  Format format = {lookup(kFormats, name, "format"), half ? Scale::F16 : single ? Scale::F32 : Scale::BF16, row};
  if (format.fmt == Fmt::FP8) format.scale = Scale::F32;
  return format;
}

// Rows arrive as bytes: NumPy has no bfloat16 of its own.
void fill(PackedWeight& self, nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> bytes,
          const std::string& type, int64_t first, int64_t count, int threads, const std::string& isa) {
  const Kernels* kernels = kernels_of(isa);
  Source source = lookup(kSources, type, "source type");
  int64_t wanted = count * self.w.k * (source == Source::F32 ? 4 : 2);
  if (int64_t(bytes.size()) != wanted) throw std::invalid_argument("rows are not [count, k] of their type");
  if (!self.w.quantises()) throw std::invalid_argument("a format that is only read takes codes, not values");
  const void* p = bytes.data();
  nb::gil_scoped_release unlocked;
  self.fill(p, source, first, count, threads, *kernels);
}

// Codes [count, k] a byte each; the scales [count, groups] of their groups; their zeros or minima alike, and [count, blocks]
// the units of both, as the format has them.
using Table = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
void fill_codes(PackedWeight& self, nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> codes, Table scales,
                const std::optional<Table>& lows, const std::optional<Table>& units, const std::optional<Table>& low_units,
                int64_t first, int threads) {
  const Weight& w = self.w;
  const int64_t count = int64_t(codes.shape(0)), groups = w.group ? (w.k + w.group - 1) / w.group : 0;
  auto is = [&](const std::optional<Table>& t, bool wanted, int64_t columns) {
    return wanted == bool(t) && (!t || (int64_t(t->shape(0)) == count && int64_t(t->shape(1)) == columns));
  };
  if (!w.group || int64_t(codes.shape(1)) != w.k || !is(scales, true, groups) ||
      !is(lows, w.zeros() || w.fmt == Fmt::K4, groups) || !is(units, w.block() > 1, groups / w.block()) ||
      !is(low_units, w.fmt == Fmt::K4, groups / w.block()))
    throw std::invalid_argument("codes are [count, k], scales and zeros or minima [count, groups], units [count, blocks]");
  auto at = [](const std::optional<Table>& t) { return t ? t->data() : nullptr; };
  const CodedRows rows{codes.data(), scales.data(), at(lows), at(units), at(low_units)};
  nb::gil_scoped_release unlocked;
  self.fill_codes(rows, first, count, threads);
}

void unpack(const PackedWeight& self, int64_t row, Floats out) {
  if (row < 0 || row >= self.w.n || int64_t(out.size()) != self.w.k) throw std::invalid_argument("row outside the weight");
  unpack_row(self.w, row, out.data());
}

// Edits of all rows one after another (row r has those from first[r] to first[r + 1]), and the mask of each row, or -1.
struct Edits {
  Ints first, ids;
  Floats scale, add;
  Ints mask_of;
  nb::ndarray<const uint32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> masks;

  void apply(std::vector<Draw>& draws) const {
    if (first.size() != draws.size() + 1 || mask_of.size() != draws.size()) throw std::invalid_argument("edits of other rows");
    if (ids.size() != scale.size() || ids.size() != add.size()) throw std::invalid_argument("one scale and one add an id");
    for (size_t r = 0; r < draws.size(); r++) {
      int64_t begin = first.data()[r];
      draws[r].edits = first.data()[r + 1] - begin;
      draws[r].ids = ids.data() + begin, draws[r].scale = scale.data() + begin, draws[r].add = add.data() + begin;
      if (int64_t m = mask_of.data()[r]; m >= 0) draws[r].mask = masks.data() + m * int64_t(masks.shape(1));
    }
  }
};

// How rows are drawn, but for their positions and edits.
struct Draws {
  std::vector<Draw> draws;

  // numbers [rows, 4]: temperature, top_p, min_p, top_k.
  Draws(nb::ndarray<const float, nb::shape<-1, 4>, nb::c_contig, nb::device::cpu> numbers,
        nb::ndarray<const uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> seeds) {
    if (numbers.shape(0) != seeds.size()) throw std::invalid_argument("one seed a row");
    for (size_t i = 0; i < seeds.size(); i++) {
      const float* p = numbers.data() + 4 * i;
      draws.push_back({p[0], p[1], p[2], int32_t(p[3]), seeds.data()[i], 0});
    }
  }
};

// Results by tensor, to be copied out [rows, columns].
using Outs = std::vector<std::tuple<int, nb::ndarray<nb::c_contig, nb::device::cpu>>>;

// numbers: tokens, positions, slots [t]; first_row, q_len, context_len [s]; rows [r]; block_table [s, columns]; and counts
// are t, s, r and columns.
void step(Executable& self, Ints numbers, const std::array<int64_t, 4>& counts, const Draws& given, const Edits* edits,
          const std::vector<std::tuple<int, int, Floats>>& taps, std::optional<nb::ndarray<double, nb::c_contig>> seconds,
          int first, int last, const Outs& outs) {
  const auto [t, s, r, columns] = counts;
  if (t < 0 || s < 0 || r < 0 || columns < 0 || int64_t(numbers.size()) != 3 * (t + s) + r + s * columns)
    throw std::invalid_argument("numbers and counts are of different batches");
  if (int64_t(given.draws.size()) != r) throw std::invalid_argument("one draw a wanted row");
  const int32_t *tokens = numbers.data(), *sequences = tokens + 3 * t, *rows = sequences + 3 * s;
  std::vector<Draw> draws = given.draws;
  if (edits) edits->apply(draws);
  StepInputs in{tokens, tokens + t, tokens + 2 * t, sequences, sequences + s, sequences + 2 * s, rows + r, rows, t, s, r, columns, draws.data()};
  for (int64_t i = 0; i < r; i++)  // a row out of range is refused before anything is drawn
    draws[size_t(i)].position = rows[i] >= 0 && rows[i] < t ? in.positions[rows[i]] + int64_t(1) : 0;
  std::vector<Tap> wanted;
  for (auto& [op, tensor, out] : taps) wanted.push_back({op, tensor, out.data()});
  double* times = seconds ? seconds->data() : nullptr;
  nb::gil_scoped_release unlocked;
  self.step(in, wanted, times, first, last);
  for (auto& [tensor, out] : outs) self.copy_out(tensor, int64_t(out.shape(0)), out.data());
}

// Best rate, in passes per second, at which threads get through `tasks` tasks.
double best_rate(int threads, int runs, int64_t tasks, const std::function<void(int, int64_t)>& task) {
  Team team(threads, [&](int thread, const Phase&, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) task(thread, i);
  });
  double best = 0;
  nb::gil_scoped_release unlocked;
  for (int i = 0; i < runs; i++) {
    auto start = std::chrono::steady_clock::now();
    team.clear(false);
    team.add(0, 0, tasks, std::max<int64_t>(1, tasks / (16 * threads)));
    team.run();
    std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    best = std::max(best, 1 / took.count());
  }
  return best;
}

// Best bytes/s of a streaming read over `megabytes` split among threads; `runs` passes.
double read_bandwidth(int threads, int megabytes, int runs, const std::string& isa) {
  const Kernels* kernels = kernels_of(isa);
  Memory memory(int64_t(megabytes) << 20);
  std::memset(memory.data(), 1, size_t(memory.size()));
  constexpr int64_t chunk = 16384;  // floats a task reads: 64 KiB
  std::vector<float> sums(size_t(threads) * 16);
  return memory.size() * best_rate(threads, runs, memory.size() / 4 / chunk, [&](int thread, int64_t i) {
    sums[size_t(thread) * 16] += kernels->read_stream((const float*)memory.data() + i * chunk, chunk);
  });
}

// Best FLOP/s of the linear kernel on operands that stay in cache: the matrix peak that a real product can approach.
double matrix_peak(int threads, const std::string& format, int group, int runs, const std::string& isa) {
  const Kernels* kernels = kernels_of(isa);
  constexpr int64_t rows = 96, depth = 1024, repeats = 96;
  std::vector<std::unique_ptr<PackedWeight>> weights;
  std::vector<std::vector<float>> memory;
  for (int i = 0; i < threads; i++) {
    weights.push_back(std::make_unique<PackedWeight>(format_of(format), kPanel, depth, group, false));
    memory.emplace_back(rows * depth * 2 + kRows * kPanel + rows * kPanel, 0.0f);
  }
  return 2.0 * rows * depth * kPanel * repeats * best_rate(threads, runs, repeats, [&](int thread, int64_t) {
    float *x = memory[size_t(thread)].data(), *tile = x + rows * depth * 2;
    Rows prepared{x, x + rows * depth, (int32_t*)(x + rows * depth + rows * 32), rows, depth, group ? depth / group : 0};
    LinearArgs a{&weights[size_t(thread)]->w, prepared, true, tile + kRows * kPanel, kPanel, nullptr, nullptr, 0, 1.0f, Act::None};
    kernels->linear_unit(a, 0, rows, 0, tile);
  });
}

}  // namespace

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // a thread that still holds a device when the interpreter ends is no fault of anybody's
  m.def("isas", &isas);
  m.def("read_bandwidth", &read_bandwidth, "threads"_a, "megabytes"_a = 512, "runs"_a = 5, "isa"_a = isas().front());
  m.def("matrix_peak", &matrix_peak, "threads"_a, "format"_a, "group"_a = 0, "runs"_a = 20, "isa"_a = isas().front());
  nb::class_<Memory>(m, "Region")
      .def(nb::init<int64_t>(), "bytes"_a)
      .def(nb::init<int, int64_t, bool>(), "file"_a, "bytes"_a, "writable"_a);
  nb::class_<PackedWeight>(m, "Weight")
      .def("__init__", [](PackedWeight* self, const std::string& format, int64_t n, int64_t k, int64_t group, bool glu) {
             new (self) PackedWeight(format_of(format), n, k, group, glu);
           }, "format"_a, "n"_a, "k"_a, "group"_a, "glu"_a)
      .def("fill", &fill, "rows"_a, "type"_a, "first"_a, "count"_a, "threads"_a, "isa"_a = isas().front())
      .def("fill_codes", &fill_codes, "codes"_a, "scales"_a, "lows"_a.none(), "units"_a.none(), "low_units"_a.none(), "first"_a, "threads"_a)
      .def("place", &PackedWeight::place, "region"_a, "offset"_a)
      .def("unpack", &unpack)
      .def("image", [](const PackedWeight& w) { return nb::bytes(w.w.data, size_t(w.bytes())); })
      .def_prop_ro("bits", [](const PackedWeight& w) { return w.w.bits(); })
      .def_prop_ro("quantises", [](const PackedWeight& w) { return w.w.quantises(); })
      .def_prop_ro("nbytes", &PackedWeight::bytes);
  nb::class_<Edits>(m, "Edits")
      .def("__init__", [](Edits* self, Ints first, Ints ids, Floats scale, Floats add, Ints mask_of, decltype(Edits::masks) masks) {
             new (self) Edits{first, ids, scale, add, mask_of, masks};
           }, "first"_a, "ids"_a, "scale"_a, "add"_a, "mask_of"_a, "masks"_a);
  nb::class_<Draws>(m, "Draws")
      .def(nb::init<nb::ndarray<const float, nb::shape<-1, 4>, nb::c_contig, nb::device::cpu>,
                    nb::ndarray<const uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>>(), "numbers"_a, "seeds"_a);
  nb::class_<Executable>(m, "Executable")
      .def("__init__", [](Executable* self, const std::string& isa, int threads, int page, std::array<int64_t, 4> limits) {
             new (self) Executable(kernels_of(isa), threads, page, {limits[0], limits[1], limits[2], limits[3]});
           }, "isa"_a, "threads"_a, "page"_a, "limits"_a)
      .def("buffer", [](Executable& e, int64_t row_bytes, bool sampled, int64_t share, int64_t shares) {
             return e.add_buffer(row_bytes, {sampled, share, shares});
           })
      .def("columns", [](Executable& e, int buffer, int64_t cols, int64_t ld, int64_t column) {
             Tensor t;
             t.buffer = buffer, t.cols = cols, t.ld = ld, t.column = column;
             return e.add_tensor(std::move(t));
           })
      .def("vector", [](Executable& e, Floats values) {
             Tensor t;
             t.vector.assign(values.data(), values.data() + values.size());
             return e.add_tensor(std::move(t));
           })
      .def("weight", [](Executable& e, std::shared_ptr<PackedWeight> w) {
             Tensor t;
             t.weight = std::move(w);
             return e.add_tensor(std::move(t));
           })
      .def("cache", [](Executable& e, int64_t pages, int heads, int head_dim, const std::string& format, bool keys) {
             return e.add_tensor(e.make_cache(pages, heads, head_dim, format_of(format).fmt, keys));
           })
      .def("op", [](Executable& e, const std::string& kind, std::vector<int> tensors, std::vector<int64_t> ints,
                    std::vector<double> floats, std::vector<int32_t> code, std::vector<float> numbers) {
             e.add_op({lookup(kKinds, kind, "op"), std::move(tensors), std::move(ints), std::move(floats), std::move(code),
                       std::move(numbers)});
           }, "kind"_a, "tensors"_a, "ints"_a, "floats"_a, "code"_a, "numbers"_a)
      .def("step", &step, "numbers"_a, "counts"_a, "draws"_a, "edits"_a.none(), "taps"_a, "seconds"_a.none(), "first"_a, "last"_a,
           "outs"_a)
      .def("copy_out", [](const Executable& e, int tensor, int64_t rows, nb::ndarray<nb::c_contig, nb::device::cpu> out) {
             e.copy_out(tensor, rows, out.data());
           })
      .def("copy_in", [](Executable& e, int tensor, int64_t rows, Floats from) { e.copy_in(tensor, rows, from.data()); });
}

}  // namespace intaglio
