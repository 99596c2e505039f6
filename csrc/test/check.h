// Minimal unit test framework: `TEST(name) { CHECK(...); }`, in a file *_test.cpp beside the code it tests.
#pragma once
#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace intaglio::test {

struct Case {
  const char* name;
  void (*run)();
};
inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}
struct Registered {
  Registered(const char* name, void (*run)()) { cases().push_back({name, run}); }
};

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};
[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  std::ostringstream text;
  text << file << ":" << line << ": " << what;
  throw Failure(text.str());
}
template <class A, class B>
void check_equal(const A& a, const B& b, const char* what, const char* file, int line) {
  if (a == b) return;
  std::ostringstream text;
  text << what << ": " << a << " is not " << b;
  fail(file, line, text.str());
}

}  // namespace intaglio::test

#define TEST(name)                                                 \
  static void name();                                              \
  static const intaglio::test::Registered registered_##name(#name, name); \
  static void name()
#define CHECK(condition) \
  if (!(condition)) intaglio::test::fail(__FILE__, __LINE__, #condition)
#define CHECK_EQUAL(a, b) intaglio::test::check_equal(a, b, #a, __FILE__, __LINE__)
// Checks that `expression` throws an Error whose message contains `text`.
#define CHECK_THROWS(Error, expression, text)                                                       \
  try {                                                                                             \
    (void)(expression);                                                                             \
    intaglio::test::fail(__FILE__, __LINE__, #expression " throws nothing");                        \
  } catch (const Error& error) {                                                                    \
    if (dynamic_cast<const intaglio::test::Failure*>(&error)) throw;                                \
    if (std::string(error.what()).find(text) == std::string::npos)                                  \
      intaglio::test::fail(__FILE__, __LINE__, std::string(#expression " throws ") + error.what()); \
  }
