// Interface of the kernels: the layout of packed weights and caches, the kernels' arguments, and Kernels, their table of
// function pointers, one for each instruction set.
#pragma once
#include <cstdint>

namespace intaglio {

enum class Fmt : int { F32, F16, BF16, I8, U8, A8, I4, U4, A4, MX4, NV4, K4, K5, K6, NF4, FP4, FP8 };
enum class Scale : int { BF16, F16, F32, E4M3 };  // format of a weight's scales
enum class Act : int { None, Silu, Gelu, GeluTanh, Relu, Relu2, Sigmoid, Tanh, Exp, Softplus };

constexpr float kTiny = 0x1p-120f;  // formats.TINY: a group whose values are below it becomes zeros, since 1 / scale overflows

constexpr int kPanel = 32;     // weight rows in a panel: two 512-bit vectors of FP32
constexpr int kMostLanes = 16;  // floats in a vector, at most
constexpr int kSpan = 128;     // activations that share one scale; more if a weight group is larger, as spans hold whole groups
constexpr int kMaxSpan = 1024;
constexpr int kTried = 5;      // candidate scales that quantisation to integers tries for a group
constexpr int kBlock = 256;    // values of a K4, K5 or K6 block, which share the units of scales and minima
constexpr int64_t groups_of_block(Fmt fmt) { return fmt == Fmt::K4 || fmt == Fmt::K5 ? 8 : fmt == Fmt::K6 ? 16 : 1; }
constexpr int kRows = 512;     // rows of a result tile, at most
constexpr int kPanels = 8;     // panels whose result tiles a kernel keeps at a time, at most
constexpr int kSplit = 512;    // positions of K/V in one split of attention; splits are merged in ascending order
constexpr int kMaxHead = 1024;  // values of a head, at most
constexpr int kTaskRows = 32;     // query rows (tokens x query heads of a K/V head) of an attention task, about
constexpr int kMaxTaskRows = 256; // and at most: the heads of one token are not divided

// Values of the codes of bitsandbytes' NF4 and FP4, before a group's scale: formats.LEVELS.
constexpr float kNormalFloats[16] = {-1, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
                                     -0.09105003625154495f, 0, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                                     0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1};
constexpr float kTwelfths[16] = {0, 0.0625f / 12, 8.0f / 12, 1, 4.0f / 12, 6.0f / 12, 2.0f / 12, 3.0f / 12,
                                 0, -0.0625f / 12, -8.0f / 12, -1, -4.0f / 12, -6.0f / 12, -2.0f / 12, -3.0f / 12};

// A weight [n, k] is packed into panels of 32 rows, K ascending within a panel. Without scales:
//   F32 [k][32]   F16 [k][32]   BF16 [k/2][32][2]
// Formats with scales consist of blocks of one group (K4, K5, K6: 256 values). A block is a head followed by the codes of its
// groups. A quad is four consecutive values of K. Codes of one group, by format:
//   I8   [group/4][32][4] bytes: code + 128
//   U8   as I8, but the code itself
//   I4   [group/4][64] bytes, 64 for each quad. Byte b: low nibble code + 8 of row b/4, high nibble that of row 16 + b/4
//   U4   as I4, but the codes themselves
//   A8, A4  as U8 and U4; the groups have minima instead of zero points
//   MX4  as I4, but the bits of E2M1; the scale is half of the E8M0 scale, as kernels use twice E2M1's value, an integer
//   NV4  as MX4, in groups of 16; the panel begins with a factor of each row's scales, [32] float, half of the published
//        one; the scale of a group is its E4M3 scale times the factor
//   K4   as U4, in groups of 32
//   K5   in groups of 32: for each four quads [4][64] bytes of low nibbles as in K4, then [64] bytes of fifth bits: bit 2 q of
//        byte b belongs to quad q of row b/4, bit 2 q + 1 to quad q of row 16 + b/4
//   K6   in groups of 16: for each two quads [3][64] bytes of codes + 32, where byte b of the three holds
//          bits 0-5:  quad 0 of row b/4 | quad 0 of row 16 + b/4 | quad 1 of row b/4
//          bits 6-7:  quad 1 of row 16 + b/4: its bits 0-1 | 2-3 | 4-5
//   NF4, FP4  as U4: codes are indices of a table of 16 floats
//   FP8  [group/2][64] bytes of E4M3, row r at r/4%4*16 + r/16*8 + r%4*2, so that interleaving the two 8-byte halves of
//        each 16 bytes gives pairs of bf16 in order
// A head has 32 scales in format `scale`, then
//   U8, U4  32 zero points, one byte each, which are subtracted from the codes
//   A8, A4  32 minima in format `scale`, which are subtracted from the values
//   K4, K5  32 units of the minima (f16), then three arrays [32] of 4 bytes, one byte for each group of a span of four:
//             low nibbles of the first span's scales (bits 0-3) and of its minima (bits 4-7) | the same of the second span
//             | bits 4-5 of the first span's scales, of its minima, of the second span's scales, of its minima
//   K6      [16][32] signed bytes: the groups' scales
// The scales and minima of K4, K5 and K6 are multiples of their units. With glu, panels alternate between the gate half and
// the up half of the rows. With `row`, all groups of a row have the same scale.
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
  // Units into which a product is divided: panels, or with glu pairs of a gate and an up panel.
  int64_t units() const { return glu ? panels / 2 : panels; }
  // True if pack_rows() can quantise values to this format; other formats are packed from codes.
  bool quantises() const {
    const bool chosen = fmt == Fmt::I8 || fmt == Fmt::I4 || fmt == Fmt::MX4;
    return !group || fmt == Fmt::FP8 || fmt == Fmt::K4 || (chosen && scale == Scale::BF16);
  }
  bool book() const { return fmt == Fmt::NF4 || fmt == Fmt::FP4; }    // codes are indices of levels()
  const float* levels() const { return fmt == Fmt::NF4 ? kNormalFloats : kTwelfths; }
  bool integer() const { return group && fmt != Fmt::FP8 && !book(); }  // x is quantised to int8
  bool pairs() const { return fmt == Fmt::BF16 || fmt == Fmt::FP8; }  // x is read in pairs of float or bf16
  int64_t scale_bytes() const { return scale == Scale::F32 ? 4 : scale == Scale::E4M3 ? 1 : 2; }
  bool factors() const { return fmt == Fmt::NV4; }  // each row has a factor of its scales
  int64_t factor_bytes() const { return factors() ? kPanel * 4 : 0; }  // at the beginning of a panel
  bool wide() const { return fmt == Fmt::I8 || fmt == Fmt::U8 || fmt == Fmt::A8; }  // integer codes of one byte
  bool zeros() const { return fmt == Fmt::U8 || fmt == Fmt::U4; }    // each group has a zero point
  bool affine() const { return fmt == Fmt::A8 || fmt == Fmt::A4; }   // each group has a minimum, stored as its scale is
  int64_t bits() const { return wide() || fmt == Fmt::FP8 ? 8 : fmt == Fmt::K6 ? 6 : fmt == Fmt::K5 ? 5 : 4; }  // of a code
  bool lines() const { return fmt == Fmt::K4 || fmt == Fmt::K5; }  // whose groups have a scale and a minimum in units
  int64_t block() const { return groups_of_block(fmt); }  // groups in a block
  int64_t head_bytes() const {
    return kPanel * (scale_bytes() + (zeros() ? 1 : affine() ? scale_bytes() : lines() ? 14 : fmt == Fmt::K6 ? 16 : 0));
  }
  int64_t code_bytes() const { return kPanel * group * bits() / 8; }  // of a group
  int64_t block_bytes() const { return head_bytes() + block() * code_bytes(); }
  // Groups in a span, which shares one scale of x (at least kSpan values), and the number of spans.
  int64_t parts() const { return (kSpan + group - 1) / group; }
  int64_t spans() const { return (padded_k / group + parts() - 1) / parts(); }
  int64_t unit_bytes() const { return glu ? 2 * panel_bytes : panel_bytes; }
};

// Rows of x, prepared for the linear kernel: float, bf16 or int8 values, zero beyond k. The rows of one pass of the kernel
// are interleaved, [step of K][row][values of the step], so that the pass reads one stream.
struct Rows {
  void* values;     // [m, padded_k], interleaved
  float* scales;    // int8: [spans][row] of each pass
  int32_t* starts;  // int8: [groups][row] of each pass, the initial value of a group's sum; K4, K5: see quantise_row()
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
  float alpha = 1, limit = 0, shift = 0;  // of a GLU pair, as defined by Experts in ops/experts.py
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
  const float* table;     // [vocabulary][top], the experts of each token id, or null: the best are chosen
  const int32_t* tokens;  // token ids by row
};

enum class NormKind : int { Rms, Layer, L2, None };

struct NormArgs {
  const float *x, *weight, *bias, *residual;
  float* out;
  int64_t ld_x, ld_residual, ld_out, width, group;
  NormKind kind;
  float eps, offset;
};

enum class MomentOf : int { Mean, Rms, Std };

// Range of keys that a query sees: a sliding window that ends at it, or from the start of its chunk; if both are 0, all.
struct VisibleKeys {
  int window = 0, chunk = 0;
  int64_t first(int64_t position) const {
    if (chunk) return position / chunk * chunk;
    return window && position >= window ? position - window + 1 : 0;
  }
  bool operator==(const VisibleKeys&) const = default;
};

// Layout of the cache: K [pages][kv_heads][head_dim][page], V [pages][kv_heads][page][v_stride], in F32, BF16, I8 or FP8. I8
// codes are signed; those of each page and head are followed by the scales of its tokens, [page] bf16. FP8 (E4M3) has a scale
// for each head, which the op holds.
constexpr int64_t cache_bytes(Fmt format) { return format == Fmt::F32 ? 4 : format == Fmt::BF16 ? 2 : 1; }  // of a value
// Bytes of one page of one head: `width` values a token, and their scales.
constexpr int64_t block_bytes(Fmt format, int64_t width, int64_t page) {
  return page * (width * cache_bytes(format) + (format == Fmt::I8 ? 2 : 0));
}

struct AttendArgs {
  const float* q;
  float* out;
  int64_t ld_q, ld_out;
  int heads, kv_heads, head_dim, v_dim, v_stride, page;
  VisibleKeys reach;
  float scale, softcap;
  Fmt format;
  const void *k, *v, *rope;  // caches; rope: of latent attention, the last rope_dim columns of the keys, or null
  int rope_dim;
  bool latent;               // the values are the first v_dim columns of the keys, and v is null
  bool one_head;             // the cache has one head; kv_heads only divides the query heads into tasks
  const float *sinks, *slopes;
  float temper, temper_every;
  int temper_from;
  const float *k_scale, *v_scale;  // of an FP8 cache: [heads of the cache]
  const int32_t* chosen;           // the positions that each token attends to, ascending; null: all
  int64_t ld_chosen, count;        // count: columns of `chosen`
  float* gathered;                 // workspace of gathered_floats() for the chosen positions of a split; null without `chosen`

  int64_t block_bytes(int64_t width) const { return intaglio::block_bytes(format, width, page); }
};

// Floats of workspace for half of a split's positions: keys, values, and the weights of `rows` query rows.
constexpr int64_t gathered_floats(Fmt format, int64_t key_width, int64_t value_width, int64_t rows) {
  return (block_bytes(format, key_width + value_width, kSplit / 2) + kSplit / 2 * 2 + 3) / 4 + kSplit / 2 * rows;
}

struct IndexArgs {  // of the op choose_keys
  const void* keys;  // cache of one head
  Fmt format;
  int heads, head_dim, page;
  float scale;
};

struct ListArgs {  // of the op attend_pooled: some heads of one token
  const float* q;
  float* out;
  int rows, stride;  // rows of q and out, `stride` floats apart, zeros beyond head_dim
  Fmt format;
  float scale;
  const float* sinks;  // one for each row; null: none
};

struct PooledRow {  // a token of a run that pool_keys pools: rows of the cache, and its biases
  const void *value, *gate;
  const float* bias;
};

struct Query {  // query rows of one attention task: consecutive tokens of one sequence, for one K/V head
  const int32_t* blocks;
  int64_t first_row, position;
  int tokens, kv_head;
};

// One step of a postfix expression. `argument`: index of the operand or number, or the Act of a call.
struct MapStep {
  enum What : int32_t { Operand, Number, Call, Add, Subtract, Multiply, Divide } what;
  int32_t argument;
};
constexpr int kMapStack = 16;

struct MapArgs {
  const float* operand[3];
  int64_t ld[3];
  bool column[3];  // the operand has one column, which is broadcast
  float* out;
  int64_t ld_out, cols;
  const MapStep* steps;
  int64_t count;
  const float* numbers;
};

// Layout of recurrent state in a slot. Blocks of kColumns columns, each of which is read from first to last; the last block of
// a head or row is narrower if its columns are no multiple of kColumns.
//   short_conv        [taps - 1][channels], the oldest token first
//   linear_attention  [heads][blocks of values][keys][values of the block]
//   selective_scan    [blocks of channels][n][channels of the block]; its rates too
//   rg_lru            [channels]
constexpr int kColumns = 32;
constexpr int64_t kStateTokens = 4;  // tokens by which linear attention without the delta rule advances a state at once

struct StateRun {  // token rows first .. first + count - 1 of one sequence, and its state
  int64_t first, count;
  const float* from;  // the state before them, or null: zeros
  float* to;          // the state after them, other memory than `from`
};

struct ConvArgs {
  const float *w, *bias;  // w: [taps][width]
  int64_t taps, width;
};

struct DecayArgs {
  const float *rates, *bias;  // rates: [width], the log decays of a step of 1
  int64_t width;
  float low, high;
  float floor;  // below 0: the log decay is floor * sigmoid(-rates * x)
};

// The op linear_attention, as defined by LinearAttention in ops/linear_attention.py. by_key: `decay` has a column per key.
struct StateAttentionArgs {
  const float *q, *k, *v, *decay, *beta, *rates, *skip;
  float* out;
  int64_t ld_q, ld_k, ld_v, ld_decay, ld_beta, ld_out, keys, values, share;
  bool delta, by_key;
  float scale;

  int64_t scratch() const { return kStateTokens * (keys + kMostLanes) + keys * kColumns; }  // floats
};

struct ScanArgs {
  const float *x, *step, *b, *c, *rates, *skip;  // rates: log decays of a step of 1
  float* out;
  int64_t ld_x, ld_step, ld_b, ld_c, ld_out, channels, n;
};

struct LruArgs {
  const float *x, *input_gate, *decay_gate, *input_bias, *decay_bias, *rates;
  float* out;
  const int32_t* positions;
  int64_t ld_x, ld_input, ld_decay, ld_out, channels;
};

// Quantised K4 block of one row: value = code * sizes[g] * unit - lows[g] * low_unit in group g. unit is NaN if a value is
// not finite or too large for the format.
struct LineBlock {
  float unit, low_unit;
  uint8_t sizes[8], lows[8], codes[kBlock];
};

struct Kernels {
  const char* name;
  void (*prepare_row)(const Weight& w, bool x_bf16, const float* x, const Rows& to, int64_t row);
  // Units unit .. unit + count - 1 of a product, for at most kRows rows. tile: [kPanels][rows][kPanel].
  void (*linear_units)(const LinearArgs& a, int64_t first_row, int64_t rows, int64_t unit, int64_t count, float* tile);
  void (*norm_row)(const NormArgs& a, int64_t row);
  // The mean, root mean square or standard deviation of n values.
  float (*moment)(const float* x, int64_t n, MomentOf of);
  void (*map_row)(const MapArgs& a, int64_t row, float* scratch);
  // Attention over one split of K/V. Writes for each query row its maximum score (top), sum of weights (total) and weighted
  // values (acc) [v_stride]. scratch: [rows, kSplit].
  void (*attend_split)(const AttendArgs& a, const Query& q, int64_t split, float* scratch, float* top, float* total, float* acc);
  // Merges the next split (t2, l2, a2) into the running state. Called in ascending order of splits.
  void (*attend_merge)(int64_t rows, int64_t width, float* top, float* total, float* acc, const float* t2, const float* l2, const float* a2);
  // Scores of the positions below `seen` of a token's sequence, whole pages of them, by the op choose_keys.
  void (*score_keys)(const IndexArgs& a, const int32_t* blocks, const float* q, const float* weights, int64_t seen, float* scores);
  // Attention over n rows, each key and value at once. scores: a.rows rows of n floats, rounded up to a multiple of 16.
  void (*attend_list)(const ListArgs& a, const void* const* keys, int64_t n, float* scores);
  // out[d] = sum over rows of softmax over rows of (gate + bias) * value, for d < width, a multiple of 16.
  void (*pool_rows)(const PooledRow* rows, int64_t n, int width, Fmt format, float* out);
  void (*route_row)(const RouteArgs& a, int64_t row, float* scratch);
  void (*combine_row)(const float* const* rows, const float* weights, int64_t count, const float* residual, float* out, int64_t n);
  // The largest of n logits, and in *first, unless `first` is null, the index of the first that is as large; NaN if any is NaN.
  float (*largest_logit)(const float* x, int64_t n, int64_t* first);
  // p[i] = exp((x[i] - top) / temperature), unless p is null; returns their sum.
  double (*weigh)(const float* x, int64_t n, float top, float temperature, float* p);
  float (*read_stream)(const float* p, int64_t n);
  // Quantisation at load: the best of kTried candidate scales for a group; scales and minima of a K4 block.
  float (*choose_scale)(const float* x, int64_t count, const float* tried, float lowest, float highest);
  void (*choose_lines)(const float* x, LineBlock* block);
  // Ops with recurrent state. conv_row: one token; x: its taps rows of the input, the oldest first, null before the sequence's
  // start. The others: all tokens of a sequence, for one head (with scratch) or for kColumns channels from `first`.
  void (*conv_row)(const ConvArgs& a, const float* const* x, float* out);
  void (*decay_row)(const DecayArgs& a, const float* x, float* step, float* decay);
  void (*attend_state)(const StateAttentionArgs& a, const StateRun& run, int64_t head, float* scratch);
  void (*scan_channels)(const ScanArgs& a, const StateRun& run, int64_t first);
  void (*lru_channels)(const LruArgs& a, const StateRun& run, int64_t first);
};

const Kernels* kernels_scalar();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_amx();

}  // namespace intaglio
