// The registry of op kinds, and OpArgs: typed and checked access to the operands and attributes of an op.
#include "run/op.h"

#include <typeinfo>

namespace intaglio {

std::map<std::string, OpFactory>& op_factories() {
  static std::map<std::string, OpFactory> factories;
  return factories;
}

OpArgs::OpArgs(Context& context, int op, std::vector<std::unique_ptr<Shared>>& shared,
               std::map<std::string, const Tensor*> operands, std::map<std::string, Attribute> attributes)
    : context(context), op_(op), shared_(shared), operands_(std::move(operands)), attributes_(std::move(attributes)) {}

namespace {
[[noreturn]] void refuse(const std::string& name, const char* wanted) {
  throw std::invalid_argument("the host's kernel takes " + name + " as " + wanted);
}
}  // namespace

const Tensor* OpArgs::find(const std::string& name) {
  used_.insert(name);
  auto at = operands_.find(name);
  return at == operands_.end() ? nullptr : at->second;
}

const Tensor* OpArgs::optional_rows(const std::string& name) {
  const Tensor* t = find(name);
  if (t && !t->buffer) refuse(name, "rows");
  return t;
}

const Tensor& OpArgs::rows(const std::string& name) {
  const Tensor* t = optional_rows(name);
  if (!t) refuse(name, "rows");
  return *t;
}

const Weight& OpArgs::weight(const std::string& name) {
  const Tensor* t = find(name);
  if (!t || !t->weight) refuse(name, "a packed weight");
  return t->weight->w;
}

const std::vector<int64_t>& OpArgs::shape(const std::string& name) {
  const Tensor* t = find(name);
  if (!t || t->shape.empty()) refuse(name, "a packed weight");
  return t->shape;
}

const std::vector<float>& OpArgs::vector(const std::string& name) {
  const Tensor* t = find(name);
  if (!t || t->vector.empty()) refuse(name, "a vector");
  return t->vector;
}

const float* OpArgs::optional_vector(const std::string& name) { return find(name) ? vector(name).data() : nullptr; }

const Cache* OpArgs::optional_cache(const std::string& name) {
  const Tensor* t = find(name);
  if (t && !t->cache) refuse(name, "a K/V cache");
  return t ? t->cache.get() : nullptr;
}

const Cache& OpArgs::cache(const std::string& name) {
  const Cache* cache = optional_cache(name);
  if (!cache) refuse(name, "a K/V cache");
  return *cache;
}

const States& OpArgs::states(const std::string& name) {
  const Tensor* t = find(name);
  if (!t || !t->states) refuse(name, "recurrent state");
  return *t->states;
}

const Attribute& OpArgs::attribute(const std::string& name) {
  used_.insert(name);
  auto at = attributes_.find(name);
  if (at == attributes_.end()) throw std::invalid_argument("the host's kernel needs attribute " + name);
  return at->second;
}

bool OpArgs::flag(const std::string& name) {
  if (auto value = std::get_if<bool>(&attribute(name))) return *value;
  refuse(name, "true or false");
}

int64_t OpArgs::integer(const std::string& name) {
  if (auto value = std::get_if<int64_t>(&attribute(name))) return *value;
  refuse(name, "an integer");
}

float OpArgs::number(const std::string& name) {
  const Attribute& a = attribute(name);
  if (auto value = std::get_if<double>(&a)) return float(*value);
  if (auto value = std::get_if<int64_t>(&a)) return float(*value);
  refuse(name, "a number");
}

const std::string& OpArgs::word(const std::string& name) {
  if (auto value = std::get_if<std::string>(&attribute(name))) return *value;
  refuse(name, "a name");
}

const std::vector<Token>& OpArgs::tokens(const std::string& name) {
  if (auto value = std::get_if<std::vector<Token>>(&attribute(name))) return *value;
  refuse(name, "an expression");
}

std::vector<int64_t> OpArgs::integers(const std::string& name) {
  std::vector<int64_t> whole;
  for (const Token& token : tokens(name)) {
    auto number = std::get_if<double>(&token);
    if (!number || *number != double(int64_t(*number))) refuse(name, "integers");
    whole.push_back(int64_t(*number));
  }
  return whole;
}

void OpArgs::ignore(const std::vector<std::string>& names) { used_.insert(names.begin(), names.end()); }

void OpArgs::check_all_used() const {
  auto check = [&](const std::string& what, const auto& given) {
    for (const auto& [name, value] : given)
      if (!used_.contains(name)) throw std::invalid_argument("the host's kernel does not know " + what + " " + name);
  };
  check("operand", operands_);
  check("attribute", attributes_);
}

Shared& OpArgs::share(std::unique_ptr<Shared> wanted) {
  for (auto& own : shared_)
    if (typeid(*own) == typeid(*wanted) && own->same_as(*wanted)) return *own;
  wanted->first_op = op_, wanted->number = shared_.size();
  shared_.push_back(std::move(wanted));
  return *shared_.back();
}

}  // namespace intaglio
