// Python binding (nanobind): executables, weights, sampling, roofs, timeline. Steps release the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <map>
#include <optional>

#include "comm/binding.h"
#include "comm/communicator.h"
#include "isa/select.h"
#include "run/executable.h"
#include "run/roofs.h"
#include "timeline/timeline.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace intaglio {
namespace {

using Ints = nb::ndarray<const int32_t, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using Seconds = nb::ndarray<double, nb::c_contig, nb::device::cpu>;

// Packs rows of values. They are passed as bytes, since NumPy has no bfloat16 type.
void fill(PackedWeight& self, nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> bytes,
          const std::string& type, int64_t first, int64_t count, int threads, const std::string& isa) {
  const Kernels* kernels = kernels_of(isa);
  Source source = source_of(type);
  int64_t wanted = count * self.w.k * (source == Source::F32 ? 4 : 2);
  if (int64_t(bytes.size()) != wanted)
    throw std::invalid_argument("rows have " + std::to_string(bytes.size()) + " bytes; [count, k] of type " + type + " has " +
                                std::to_string(wanted));
  if (!self.w.quantises()) throw std::invalid_argument("values are not quantised to this format; pass codes to fill_codes()");
  const void* p = bytes.data();
  nb::gil_scoped_release unlocked;
  self.fill(p, source, first, count, threads, *kernels);
}

// Packs rows of codes [count, k], one byte each, with scales [count, groups] and, where the format has them, zeros or minima
// `lows` [count, groups] and the units of scales and minima [count, blocks].
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
      !is(lows, w.zeros() || w.affine() || w.lines(), groups) || !is(units, w.block() > 1 || w.factors(), w.factors() ? 1 : groups / w.block()) ||
      !is(low_units, w.lines(), groups / w.block()))
    throw std::invalid_argument("codes are [count, k], scales and zeros or minima [count, groups], units [count, blocks], or [count, 1] of nvfp4");
  auto at = [](const std::optional<Table>& t) { return t ? t->data() : nullptr; };
  const CodedRows rows{codes.data(), scales.data(), at(lows), at(units), at(low_units)};
  nb::gil_scoped_release unlocked;
  self.fill_codes(rows, first, count, threads);
}

void unpack(const PackedWeight& self, int64_t row, Floats out) {
  if (row < 0 || row >= self.w.n || int64_t(out.size()) != self.w.k) throw std::invalid_argument("row outside the weight");
  unpack_row(self.w, row, out.data());
}

// Logit edits of all rows, concatenated (row r has those from first[r] to first[r + 1]), and the number of each row's
// grammar mask, or -1.
struct Edits {
  Ints first, ids;
  Floats scale, add;
  Ints mask_of;
  nb::ndarray<const uint32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> masks;

  void apply(std::vector<RowSampling>& draws) const {
    if (first.size() != draws.size() + 1 || mask_of.size() != draws.size())
      throw std::invalid_argument("logit edits are for another number of rows than " + std::to_string(draws.size()));
    if (ids.size() != scale.size() || ids.size() != add.size())
      throw std::invalid_argument("logit edits need one scale and one add for each id");
    for (size_t r = 0; r < draws.size(); r++) {
      int64_t begin = first.data()[r];
      draws[r].edits = first.data()[r + 1] - begin;
      draws[r].ids = ids.data() + begin, draws[r].scale = scale.data() + begin, draws[r].add = add.data() + begin;
      if (int64_t m = mask_of.data()[r]; m >= 0) draws[r].mask = masks.data() + m * int64_t(masks.shape(1));
    }
  }
};

// Sampling parameters of the rows of a step, without positions and logit edits.
struct SamplingParams {
  std::vector<RowSampling> draws;

  // numbers [rows, 4]: temperature, top_p, min_p, top_k.
  SamplingParams(nb::ndarray<const float, nb::shape<-1, 4>, nb::c_contig, nb::device::cpu> numbers,
        nb::ndarray<const uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> seeds) {
    if (numbers.shape(0) != seeds.size()) throw std::invalid_argument("sampling parameters need one seed for each row");
    for (size_t i = 0; i < seeds.size(); i++) {
      const float* p = numbers.data() + 4 * i;
      draws.push_back({p[0], p[1], p[2], int32_t(p[3]), seeds.data()[i], 0});
    }
  }
};

// (tensor number, array [rows, columns] to which it is copied) for each result.
using Outs = std::vector<std::pair<int, nb::ndarray<nb::c_contig, nb::device::cpu>>>;

// An executable, with the arrays of its current step to keep them alive.
struct Session {
  Executable executable;
  Ints numbers;
  std::optional<Edits> edits;
  std::vector<RowSampling> draws;
  std::vector<std::tuple<int, int, Floats>> taps;
  std::optional<Seconds> seconds;

  // given: the batch's arrays concatenated: tokens, positions, slots [t]; first_row, q_len, context_len,
  // state_from, state_to [s]; rows [r]; block_table [s, columns]; if `windows` is 1, window_slots [t] and
  // window_table [s, columns]. counts: t, s, r, columns and windows.
  void begin(Ints given, const std::array<int64_t, 5>& counts, const SamplingParams& drawn, const Edits* edited,
             std::vector<std::tuple<int, int, Floats>> tapped, std::optional<Seconds> timed) {
    const auto [t, s, r, columns, windows] = counts;
    const int64_t plain = kPerToken * t + kPerSequence * s + r + s * columns;
    if (t < 0 || s < 0 || r < 0 || columns < 0 || int64_t(given.size()) != plain + (windows ? t + s * columns : 0))
      throw std::invalid_argument("the batch's arrays do not have the sizes given in counts");
    if (int64_t(drawn.draws.size()) != r) throw std::invalid_argument("a step needs sampling parameters for each of its rows");
    numbers = given, draws = drawn.draws, taps = std::move(tapped), seconds = timed;
    edits = edited ? std::optional(*edited) : std::nullopt;
    if (edits) edits->apply(draws);
    const int32_t *tokens = numbers.data(), *sequences = tokens + kPerToken * t, *rows = sequences + kPerSequence * s;
    const StepInputs in{tokens, tokens + t, tokens + 2 * t, sequences, sequences + s, sequences + 2 * s, sequences + 3 * s,
                        sequences + 4 * s, rows + r, rows, windows ? tokens + plain : nullptr,
                        windows ? tokens + plain + t : nullptr, t, s, r, columns, draws.data()};
    for (int64_t i = 0; i < r; i++)  // executable.begin() throws for a row out of range
      draws[size_t(i)].position = rows[i] >= 0 && rows[i] < t ? in.positions[rows[i]] + int64_t(1) : 0;
    std::vector<Tap> wanted;
    for (auto& [op, tensor, out] : taps) wanted.push_back({op, tensor, out.data()});
    double* times = seconds ? seconds->data() : nullptr;
    nb::gil_scoped_release unlocked;
    executable.begin(in, std::move(wanted), times);
  }

  int advance(const Outs& outs) {
    nb::gil_scoped_release unlocked;
    const int stop = executable.advance();
    for (auto& [tensor, out] : outs) executable.copy_out(tensor, int64_t(out.shape(0)), out.data());
    return stop;
  }
};

std::vector<std::string> op_kinds() {
  std::vector<std::string> kinds;
  for (const auto& [kind, factory] : op_factories()) kinds.push_back(kind);
  return kinds;
}

}  // namespace

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // a thread may legitimately hold a device when the interpreter ends
  bind_comm(m);
  m.attr("PANEL_ROWS") = kPanel;
  m.attr("PAGE_MULTIPLE") = kPageMultiple;
  m.def("isas", &isas);
  m.def("op_kinds", &op_kinds);
  m.def("exposed_seconds", &exposed_seconds, "numbers"_a, "first"_a, "second"_a, "collective"_a);
  m.def("prefetched_ends", &prefetched_ends, "numbers"_a, "seconds"_a, "weights"_a, "others"_a, "ahead"_a);
  m.def("read_bandwidth", [](int threads, int megabytes, int runs, const std::string& isa) {
          nb::gil_scoped_release unlocked;
          return read_bandwidth(threads, megabytes, runs, *kernels_of(isa));
        }, "threads"_a, "megabytes"_a = 512, "runs"_a = 5, "isa"_a = isas().front());
  m.def("matrix_peak", [](int threads, const std::string& format, int group, int runs, const std::string& isa) {
          nb::gil_scoped_release unlocked;
          return matrix_peak(threads, format_of(format), group, runs, *kernels_of(isa));
        }, "threads"_a, "format"_a, "group"_a = 0, "runs"_a = 20, "isa"_a = isas().front());
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
      .def("take", &PackedWeight::take, "other"_a)
      .def("unpack", &unpack)
      .def("image", [](const PackedWeight& w) { return nb::bytes(w.w.data, size_t(w.bytes())); })
      .def_prop_ro("bits", [](const PackedWeight& w) { return w.w.bits(); })
      .def_prop_ro("quantises", [](const PackedWeight& w) { return w.w.quantises(); })
      .def_prop_ro("nbytes", &PackedWeight::bytes);
  nb::class_<Edits>(m, "Edits")
      .def("__init__", [](Edits* self, Ints first, Ints ids, Floats scale, Floats add, Ints mask_of, decltype(Edits::masks) masks) {
             new (self) Edits{first, ids, scale, add, mask_of, masks};
           }, "first"_a, "ids"_a, "scale"_a, "add"_a, "mask_of"_a, "masks"_a);
  nb::class_<SamplingParams>(m, "SamplingParams")
      .def(nb::init<nb::ndarray<const float, nb::shape<-1, 4>, nb::c_contig, nb::device::cpu>,
                    nb::ndarray<const uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>>(), "numbers"_a, "seeds"_a);
  nb::class_<Session>(m, "Executable")
      .def("__init__", [](Session* self, const std::string& isa, int threads, int page, std::array<int64_t, 7> limits) {
             new (self) Session{.executable = Executable(*kernels_of(isa), threads, page, {limits[0], limits[1], limits[2], limits[3], limits[4], limits[5], limits[6]}),
                                .numbers = {}, .edits = {}, .draws = {}, .taps = {}, .seconds = {}};
           }, "isa"_a, "threads"_a, "page"_a, "limits"_a)
      .def("buffer", [](Session& s, int64_t row_bytes, bool sampled, int64_t share, int64_t shares) {
             return s.executable.add_buffer(row_bytes, {sampled, share, shares});
           }, "row_bytes"_a, "sampled"_a, "share"_a, "shares"_a)
      .def("columns", [](Session& s, int buffer, int64_t cols, int64_t ld, int64_t column) {
             return s.executable.add_columns(buffer, cols, ld, column);
           }, "buffer"_a, "cols"_a, "ld"_a, "column"_a)
      .def("vector", [](Session& s, Floats values) {
             return s.executable.add_vector({values.data(), values.data() + values.size()});
           }, "values"_a)
      .def("weight", [](Session& s, std::shared_ptr<PackedWeight> w, std::vector<int64_t> shape) {
             return s.executable.add_weight(std::move(w), std::move(shape));
           }, "weight"_a, "shape"_a)
      .def("keep_caches_in", [](Session& s, int file) { s.executable.keep_caches_in(file); }, "file"_a)
      .def("cache", [](Session& s, int64_t pages, int heads, int head_dim, const std::string& format, bool keys, bool windowed, int rows) {
             return s.executable.add_cache(pages, heads, head_dim, format_of(format).fmt, keys, windowed, rows);
           }, "pages"_a, "heads"_a, "head_dim"_a, "format"_a, "keys"_a, "windowed"_a = false, "rows"_a = 0)
      .def("states", [](Session& s, int64_t slots, int64_t floats) { return s.executable.add_states(slots, floats); },
           "slots"_a, "floats"_a)
      .def("op", [](Session& s, const std::string& kind, const std::map<std::string, int>& operands,
                    std::map<std::string, Attribute> attributes) {
             return s.executable.add_op(kind, operands, std::move(attributes));
           }, "kind"_a, "operands"_a, "attributes"_a)
      .def("join", [](Session& s, std::shared_ptr<Communicator> c) { s.executable.join(std::move(c)); }, "communicator"_a)
      .def("stop", [](Session& s) { return s.executable.add_stop(); })
      .def("begin", &Session::begin, "numbers"_a, "counts"_a, "draws"_a, "edits"_a.none(), "taps"_a, "seconds"_a.none())
      .def("advance", &Session::advance, "outs"_a)
      .def("copy_out", [](const Session& s, int tensor, nb::ndarray<nb::c_contig, nb::device::cpu> out) {
             s.executable.copy_out(tensor, int64_t(out.shape(0)), out.data());
           }, "tensor"_a, "out"_a)
      .def("copy_in", [](Session& s, int tensor, nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu> values) {
             s.executable.copy_in(tensor, int64_t(values.shape(0)), values.data());
           }, "tensor"_a, "values"_a)
      .def_prop_ro("page_bytes", [](const Session& s) { return s.executable.page_bytes(); })
      .def_prop_ro("page_parts", [](const Session& s) { return s.executable.page_parts(); })
      .def("read_page", [](const Session& s, int64_t page, nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> out) {
             if (int64_t(out.size()) != s.executable.page_bytes()) throw std::invalid_argument("a page has page_bytes bytes");
             s.executable.read_page(page, out.data());
           }, "page"_a, "out"_a)
      .def("write_page", [](Session& s, int64_t page, nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> from) {
             if (int64_t(from.size()) != s.executable.page_bytes()) throw std::invalid_argument("a page has page_bytes bytes");
             s.executable.write_page(page, from.data());
           }, "page"_a, "values"_a)
      .def("expert_tokens", [](const Session& s, int op) { return s.executable.expert_tokens(op); }, "op"_a)
      .def("place_experts", [](Session& s, int op, const std::vector<int64_t>& held, const std::vector<int64_t>& copy,
                               const std::vector<int64_t>& copies) { s.executable.place_experts(op, held, copy, copies); },
           "op"_a, "held"_a, "copy"_a, "copies"_a)
      .def("set_vector", [](Session& s, int tensor, Floats values) {
             s.executable.set_vector(tensor, {values.data(), values.data() + values.size()});
           }, "tensor"_a, "values"_a)
      .def_prop_ro("plans", [](const Session& s) { return s.executable.plans(); })
      .def_prop_ro("planning_seconds", [](const Session& s) { return s.executable.planning_seconds(); });
}

}  // namespace intaglio
