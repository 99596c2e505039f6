// What the kernels take and do, whatever instruction set they were compiled for.
#pragma once
#include <cstdint>

namespace intaglio {

enum class Fmt : int { F32, F16, BF16, I8, U8, I4, U4, MX4, K4, K6, FP8 };
enum class Scale : int { BF16, F16, F32 };  // what a weight's scales are kept in
enum class Act : int { None, Silu, Gelu, GeluTanh, Relu, Relu2, Sigmoid, Tanh, Exp };

constexpr float kTiny = 0x1p-120f;  // formats.TINY: groups below it are zeros, for 1 / scale would overflow

constexpr int kPanel = 32;     // columns of a packed panel: two 512-bit vectors
constexpr int kSpan = 128;     // activations that share a scale, at least; groups are not torn
constexpr int kMaxSpan = 1024;
constexpr int kTried = 5;      // scales of a group of whole numbers, when they are chosen
constexpr int kBlock = 256;    // values of K4 and K6 that share the units of their scales
constexpr int64_t groups_of_block(Fmt fmt) { return fmt == Fmt::K4 ? 8 : fmt == Fmt::K6 ? 16 : 1; }
constexpr int kRows = 512;     // rows of a result tile held per thread
constexpr int kSplit = 512;    // positions of K/V whose softmax is taken as one; splits are merged in ascending order
constexpr int kTaskRows = 32;     // query rows (tokens x heads of a group) an attention task aims at
constexpr int kMaxTaskRows = 256; // and what one token's heads may come to

// A weight [n, k] packed into panels of 32 rows, K ascending inside a panel:
//   F32 [k][32]   F16 [k][32]   BF16 [k/2][32][2]
// and formats with scales in blocks of one group or, with K4 and K6, of 256 values. A block is a head and then the codes of
// its groups:
//   I8 [group/4][32][4] codes + 128
//   U8 like I8, of codes from 0 on
//   I4 [group/4][64] bytes, byte b: code + 8 of row b/4 low, of row 16 + b/4 high
//   U4 like I4, of codes from 0 on
//   MX4 like I4, of E2M1's bits (sign, exponent, mantissa); scales are half of E8M0's, for twice the value is whole
//   K4 like U4, groups of 32
//   K6 groups of 16: of two quads [3][64] bytes, the low six bits of which are codes + 32 of row b/4 of the first quad, of
//       row 16 + b/4, and of row b/4 of the second; of row 16 + b/4 of the second, they have two bits each above, low first
//   FP8 [group/2][64] bytes of E4M3, of row r at r/4%4*16 + r/16*8 + r%4*2, where halves of 16 bytes interleave to pairs
//       of bf16 in order
// Heads have 32 scales, as `scale` says. After them, U8 and U4 32 zeros, a byte each, that are taken off the codes; K4 32 units of
// minima (f16) and 3 words [32] of a byte for each group of a span of four: low nibbles of the first span's scales, and above
// them of its minima; the second span's; and the high two bits of the first's scales, its minima, and the second's of
// both; K6 [16][32] signed bytes, the groups' scales. Scales of K4 and K6, and minima, are in those units.
// With glu, panels alternate between the gate half and the up half. With `row`, the groups of a row share a scale.
struct Weight {
  Fmt fmt;
  Scale scale;
  int64_t n, k, group;
  bool glu, row;
  int64_t padded_k, panels, panel_bytes;
  uint8_t* data;

  int64_t half() const { return glu ? n / 2 : n; }
  int64_t panel_of(int64_t row) const {
    return !glu ? row / kPanel : row < n / 2 ? row / kPanel * 2 : (row - n / 2) / kPanel * 2 + 1;
  }
  int64_t lane_of(int64_t row) const { return (glu && row >= n / 2 ? row - n / 2 : row) % kPanel; }
  // What a product is cut into: a panel, or with glu a pair of them.
  int64_t units() const { return glu ? panels / 2 : panels; }
  // Whether values can be rounded to it here; the codes of others are only copied.
  bool quantises() const {
    const bool chosen = fmt == Fmt::I8 || fmt == Fmt::I4 || fmt == Fmt::MX4;
    return !group || fmt == Fmt::FP8 || fmt == Fmt::K4 || (chosen && scale == Scale::BF16);
  }
  bool integer() const { return group && fmt != Fmt::FP8; }           // x becomes int8
  bool pairs() const { return fmt == Fmt::BF16 || fmt == Fmt::FP8; }  // x goes in pairs, of float or bf16
  int64_t scale_bytes() const { return scale == Scale::F32 ? 4 : 2; }
  bool wide() const { return fmt == Fmt::I8 || fmt == Fmt::U8; }   // codes that are a byte each
  bool zeros() const { return fmt == Fmt::U8 || fmt == Fmt::U4; }  // whose codes each group has a zero of
  int64_t bits() const { return wide() || fmt == Fmt::FP8 ? 8 : fmt == Fmt::K6 ? 6 : 4; }  // of a code
  int64_t block() const { return groups_of_block(fmt); }  // groups that share a head
  int64_t head_bytes() const {
    return kPanel * (scale_bytes() + (zeros() ? 1 : fmt == Fmt::K4 ? 14 : fmt == Fmt::K6 ? 16 : 0));
  }
  int64_t code_bytes() const { return kPanel * group * bits() / 8; }  // of a group
  int64_t block_bytes() const { return head_bytes() + block() * code_bytes(); }
  // Groups that share one scale of x, at least 128 values together, and how many such spans there are.
  int64_t parts() const { return (kSpan + group - 1) / group; }
  int64_t spans() const { return (padded_k / group + parts() - 1) / parts(); }
  int64_t unit_bytes() const { return glu ? 2 * panel_bytes : panel_bytes; }
};

// Rows as a weight's kernel reads them: float, bf16 or int8 values, zero beyond k. Rows that one pass of a kernel takes
// together stand interleaved, [step of K][row][values of the step], so that the pass reads one stream.
struct Rows {
  void* values;    // [m, padded_k] in that order
  float* scales;    // int8: [spans][row] within a pass
  int32_t* starts;  // int8: [groups][row] within a pass, what the sum of a group starts from; K4: see quantise_row()
  int64_t m, padded_k, groups;
};

struct LinearArgs {
  const Weight* w;
  Rows x;
  bool x_bf16;
  float* out;
  int64_t ld_out;
  const float *bias, *residual;
  int64_t ld_residual;
  float scale;
  Act act;
  float alpha = 1, limit = 0, shift = 0;  // of a gated pair, as ops/experts.py's Experts says
};

enum class RouteScore : int { Softmax, Sigmoid, SqrtSoftplus, Chosen, Sparsemixer };
constexpr int kMaxGroups = 256, kMaxTop = 64;

struct RouteArgs {
  const float *logits, *bias;
  float* weights;
  int32_t* ids;
  int64_t ld_logits, ld_weights, ld_ids, experts, top, groups, kept, group_best;
  RouteScore score;
  bool normalise;
  float scale, jitter;
};

struct NormArgs {
  const float *x, *weight, *bias, *residual;
  float* out;
  int64_t ld_x, ld_residual, ld_out, width, group;
  int kind;  // 0 rms, 1 layer, 2 l2
  float eps, offset;
};

// What a query at a position sees: a window back from it, or its chunk from the start on; 0 of both sees all.
struct Reach {
  int window = 0, chunk = 0;
  int64_t first(int64_t position) const {
    if (chunk) return position / chunk * chunk;
    return window && position >= window ? position - window + 1 : 0;
  }
  bool operator==(const Reach&) const = default;
};

// K pages are [pages][kv_heads][head_dim][page], V pages [pages][kv_heads][page][v_stride]; f32, bf16 or I8. Codes of I8
// are signed, and after those of a page and head come the scales of its tokens, [page] bf16.
constexpr int64_t cache_bytes(Fmt format) { return format == Fmt::F32 ? 4 : format == Fmt::BF16 ? 2 : 1; }  // of a value
// Of the values of a page and head, `width` a token, and their scales.
constexpr int64_t block_bytes(Fmt format, int64_t width, int64_t page) {
  return page * (width * cache_bytes(format) + (format == Fmt::I8 ? 2 : 0));
}

struct AttendArgs {
  const float* q;
  float* out;
  int64_t ld_q, ld_out;
  int heads, kv_heads, head_dim, v_dim, v_stride, page;
  Reach reach;
  float scale, softcap;
  Fmt format;
  const void *k, *v, *rope;  // rope: more columns of the keys, or null
  int rope_dim;
  bool latent;               // values are the keys' first columns, v_dim of them, and v is null
  bool one_head;             // the cache has one head, and kv_heads are only how query heads are cut into tasks
  const float* sinks;
  float temper, temper_every;

  int64_t block_bytes(int64_t width) const { return intaglio::block_bytes(format, width, page); }
};

struct Query {  // tokens of one sequence at consecutive positions, under one kv head
  const int32_t* blocks;
  int64_t first_row, position;
  int tokens, kv_head;
};

struct MapArgs {
  const float* operand[3];
  int64_t ld[3];
  bool column[3];  // one value for the whole row
  float* out;
  int64_t ld_out, cols;
  const int32_t* code;  // pairs (step, argument): 0 operand, 1 number, 2 function, 3 + 4 - 5 * 6 /
  const float* numbers;
  int64_t steps;
};

struct Draw {
  float temperature, top_p, min_p;
  int32_t top_k;
  uint64_t seed;
  int64_t position;
  // What becomes of the logits first: at ids[i], l turns into (l > 0 ? l / scale[i] : l * scale[i]) + add[i]; then those
  // whose bit in the mask is 0 are out.
  int64_t edits = 0;
  const int32_t* ids = nullptr;
  const float *scale = nullptr, *add = nullptr;
  const uint32_t* mask = nullptr;
};

// K4's block of a row: code * size * unit - low * low_unit, size and low by group. unit is NaN if a value is not finite, or
// out of reach.
struct LineBlock {
  float unit, low_unit;
  uint8_t sizes[8], lows[8], codes[kBlock];
};

struct Kernels {
  const char* name;
  void (*prepare_row)(const Weight& w, bool x_bf16, const float* x, const Rows& to, int64_t row);
  void (*linear_unit)(const LinearArgs& a, int64_t first_row, int64_t rows, int64_t unit, float* tile);
  void (*norm_row)(const NormArgs& a, int64_t row);
  void (*map_row)(const MapArgs& a, int64_t row, float* scratch);
  // One split of K/V: per query row its maximum, sum and weighted values [v_stride]; scratch is [rows, kSplit].
  void (*attend_split)(const AttendArgs& a, const Query& q, int64_t split, float* scratch, float* top, float* total, float* acc);
  // The next split joins the running state, in ascending order of splits.
  void (*attend_merge)(int64_t rows, int64_t width, float* top, float* total, float* acc, const float* t2, const float* l2, const float* a2);
  void (*route_row)(const RouteArgs& a, int64_t row, float* scratch);
  void (*combine_row)(const float* const* rows, const float* weights, int64_t count, const float* residual, float* out, int64_t n);
  // The largest of n logits; NaN if any is NaN.
  float (*largest_logit)(const float* x, int64_t n);
  // p[i] = exp((x[i] - top) / temperature); returns their sum.
  double (*weigh)(const float* x, int64_t n, float top, float temperature, float* p);
  float (*read_stream)(const float* p, int64_t n);
  // At load: of kTried scales the best for a group, and K4's for a block.
  float (*choose_scale)(const float* x, int64_t count, const float* tried, float lowest, float highest);
  void (*choose_lines)(const float* x, LineBlock* block);
};

// Draws a token from one row of logits, as ops/sample.py's draw(); -1 and NaN if a logit is NaN or the largest, edited or
// not, is not finite.
void sample_row(const Kernels& kernels, const float* logits, int64_t n, const Draw& d, int32_t* token, float* logprob);

const Kernels* kernels_scalar();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();

}  // namespace intaglio
