// Op map: an elementwise expression over up to three operands.
#include <numeric>

#include "ops/names.h"

namespace intaglio {
namespace {

const Choices<MapStep::What>& operators() {
  static const Choices<MapStep::What> names = {
      {"+", MapStep::Add}, {"-", MapStep::Subtract}, {"*", MapStep::Multiply}, {"/", MapStep::Divide}};
  return names;
}

class Map : public OpKernel {
 public:
  explicit Map(OpArgs& a) : kernels_(a.context.kernels), out_(a.rows("out")) {
    for (size_t i = 0; i < 3; i++) {
      operands_[i] = a.optional_rows(std::string(1, char('a' + i)));
      if (operands_[i] && operands_[i]->cols < out_.cols) runs_ = std::lcm(runs_, operands_[i]->cols);
    }
    compile(a.tokens("expr"));
  }
  void plan(Planner& p) override { p.rows(out_.rows(), out_.cols); }
  void run(int, int64_t begin, int64_t end, Scratch& mine) override {
    const int64_t width = out_.cols / runs_;
    for (int64_t j = 0; j < runs_; j++) {
      MapArgs a{{}, {}, {}, out_.row(0) + j * width, out_.ld, width, steps_.data(), int64_t(steps_.size()), numbers_.data()};
      for (size_t i = 0; i < 3; i++)
        if (const Tensor* x = operands_[i]) {
          const int64_t run = out_.cols / x->cols;  // columns of the result that read one column of the operand
          a.operand[i] = x->row(0) + j * width / run, a.ld[i] = x->ld, a.column[i] = run > 1;
        }
      for (int64_t r = begin; r < end; r++) kernels_.map_row(a, r, mine.floats);
    }
  }

 private:
  void compile(const std::vector<Token>& tokens) {
    int depth = 0, deepest = 0;
    for (const Token& token : tokens) {
      steps_.push_back(step_of(token));
      depth += steps_.back().what <= MapStep::Number ? 1 : steps_.back().what == MapStep::Call ? 0 : -1;
      deepest = std::max(deepest, depth);
    }
    if (deepest > kMapStack)
      throw std::invalid_argument("the expression needs a stack of " + std::to_string(deepest) + "; the host's has " + std::to_string(kMapStack) + " entries");
  }

  MapStep step_of(const Token& token) {
    if (auto number = std::get_if<double>(&token)) {
      numbers_.push_back(float(*number));
      return {MapStep::Number, int32_t(numbers_.size()) - 1};
    }
    const std::string& name = std::get<std::string>(token);
    if (name.size() == 1 && name >= "a" && name <= "c") return {MapStep::Operand, name[0] - 'a'};
    if (name.size() == 1) return {OpArgs::choose("operator", name, operators()), 0};
    return {MapStep::Call, int32_t(OpArgs::choose("function", name, activations()))};
  }

  const Kernels& kernels_;
  const Tensor& out_;
  const Tensor* operands_[3];
  int64_t runs_ = 1;  // equal runs of columns, in each of which every operand has one value or one per column
  std::vector<MapStep> steps_;
  std::vector<float> numbers_;
};

const Registered<Map> map("map");

}  // namespace
}  // namespace intaglio
