// Runs all unit tests, or those whose name contains the first argument. Exit status 1 if any fails.
#include <cstdio>

#include "test/check.h"

int main(int argc, char** argv) {
  int failed = 0, run = 0;
  for (const auto& test : intaglio::test::cases()) {
    if (argc > 1 && std::string(test.name).find(argv[1]) == std::string::npos) continue;
    run++;
    try {
      test.run();
    } catch (const std::exception& error) {
      std::printf("FAILED %s\n  %s\n", test.name, error.what());
      failed++;
    }
  }
  std::printf("%d passed, %d failed\n", run - failed, failed);
  return failed || !run;
}
