// OpKernel: base class of native ops. An op is constructed from the operands and attributes of a Program's op, under the
// names of its Python class (src/intaglio/ops). Each kind registers itself in the file of its family in csrc/ops/.
#pragma once
#include <functional>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "run/plan.h"

namespace intaglio {

class OpKernel : public Work {
 public:
  // Adds the op's phases for the planner's batch and requests memory. May depend only on the sizes of the batch.
  virtual void plan(Planner& p) = 0;
  // Tells an op which work that prefetches weights comes next after it, so that it may call fetch_ahead() while it waits.
  virtual void set_next(const Work& /*next*/) {}
  // Of an op with experts: tokens routed to each expert of the model so far; null for others.
  virtual const std::vector<int64_t>* expert_tokens() const { return nullptr; }
  // Of an op with experts: the attributes of the same names, anew. Not during a step; the weights change with them.
  virtual void place_experts(const std::vector<int64_t>& /*held*/, const std::vector<int64_t>& /*copy*/, const std::vector<int64_t>& /*copies*/) {
    throw std::invalid_argument("this op has no experts");
  }
};

// A token of a postfix expression: a number, or the name of an operand, an operator or a function.
using Token = std::variant<double, std::string>;
using Attribute = std::variant<bool, int64_t, double, std::string, std::vector<Token>>;
// Name and value of each alternative of an attribute, such as of an activation.
template <class T>
using Choices = std::vector<std::pair<std::string, T>>;

// Operands and attributes from which an op is constructed. Throws invalid_argument for one that is missing or of the wrong
// type and, in check_all_used(), for one that the kernel did not read, so that no attribute is ignored silently.
class OpArgs {
 public:
  OpArgs(Context& context, int op, std::vector<std::unique_ptr<Shared>>& shared, std::map<std::string, const Tensor*> operands,
         std::map<std::string, Attribute> attributes);

  Context& context;

  // Operands by name: columns of a buffer, a packed weight, its declared shape, a vector, a K/V cache, recurrent state. The optional_ ones
  // return null if the op has no such operand; the others throw.
  const Tensor& rows(const std::string& name);
  const Tensor* optional_rows(const std::string& name);
  const Weight& weight(const std::string& name);
  const std::vector<int64_t>& shape(const std::string& name);
  const std::vector<float>& vector(const std::string& name);
  const float* optional_vector(const std::string& name);
  const Cache& cache(const std::string& name);
  const Cache* optional_cache(const std::string& name);
  const States& states(const std::string& name);

  bool flag(const std::string& name);
  int64_t integer(const std::string& name);
  float number(const std::string& name);
  const std::string& word(const std::string& name);
  const std::vector<Token>& tokens(const std::string& name);
  std::vector<int64_t> integers(const std::string& name);
  template <class T>
  T choice(const std::string& name, const Choices<T>& choices) {
    return choose(name, word(name), choices);
  }
  // Marks operands or attributes as used that the kernel does not need.
  void ignore(const std::vector<std::string>& names);
  // Throws invalid_argument for an operand or attribute that was neither read nor ignored.
  void check_all_used() const;

  // The executable's Shared of type T that is the same as T(args...); created if there is none yet.
  template <class T, class... Args>
  T& share(Args&&... args) {
    return static_cast<T&>(share(std::make_unique<T>(std::forward<Args>(args)...)));
  }

  template <class T>
  static T choose(const std::string& name, const std::string& value, const Choices<T>& choices) {
    std::string known;
    for (const auto& [text, choice] : choices) {
      if (text == value) return choice;
      if (!text.empty()) known += (known.empty() ? "" : ", ") + text;
    }
    throw std::invalid_argument(name + "='" + value + "'; the host knows " + known);
  }

 private:
  const Tensor* find(const std::string& name);
  const Attribute& attribute(const std::string& name);
  Shared& share(std::unique_ptr<Shared> wanted);

  int op_;
  std::vector<std::unique_ptr<Shared>>& shared_;
  std::map<std::string, const Tensor*> operands_;
  std::map<std::string, Attribute> attributes_;
  std::set<std::string> used_;
};

using OpFactory = std::function<std::unique_ptr<OpKernel>(OpArgs&)>;
// Factories of all native ops by kind, filled by static initialisers.
std::map<std::string, OpFactory>& op_factories();

// Registers a kernel class for a kind of op: `static const Registered<Norm> norm("norm");`
template <class Kernel>
struct Registered {
  explicit Registered(const char* kind) {
    op_factories()[kind] = [](OpArgs& args) { return std::make_unique<Kernel>(args); };
  }
};

}  // namespace intaglio
