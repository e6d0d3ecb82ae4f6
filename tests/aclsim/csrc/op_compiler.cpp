// libacl_op_compiler.so: the older operator interface, which torch_npu falls back to for an operator that libopapi.so
// lacks. It can compile nothing.
#include "acl/acl_op_compiler.h"

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

#include "acl/acl.h"

namespace {

std::map<int, std::string>& options() {
  static auto* const made = new std::map<int, std::string>;
  return *made;
}

std::string option(int key) {
  const auto found = options().find(key);
  return found == options().end() ? "disable" : found->second;
}

// torch_npu calls from a thread of its own: told of an error it raises at a later operator, and then drops all others
// without a word.
[[noreturn]] void end_without(const char* name) {
  std::fprintf(stderr, "[aclsim] the simulated NPU has no operator %s (tests/aclsim/csrc/operators.cpp)\n", name);
  std::abort();
}

}  // namespace

extern "C" {

aclError aclSetCompileopt(aclCompileOpt key, const char* value) {
  options()[key] = value;
  return 0;
}

size_t aclGetCompileoptSize(aclCompileOpt key) { return option(key).size() + 1; }

aclError aclGetCompileopt(aclCompileOpt key, char* value, size_t bytes) {
  std::snprintf(value, bytes, "%s", option(key).c_str());
  return 0;
}

aclError aclopCompileAndExecute(const char* name, int, const aclTensorDesc* const[], const aclDataBuffer* const[],
                                int, const aclTensorDesc* const[], aclDataBuffer* const[], const aclopAttr*,
                                aclopEngineType, aclopCompileType, const char*, aclrtStream) {
  end_without(name);
}

aclError aclopCompileAndExecuteV2(const char* name, int, aclTensorDesc*[], aclDataBuffer*[], int, aclTensorDesc*[],
                                  aclDataBuffer*[], aclopAttr*, aclopEngineType, aclopCompileType, const char*,
                                  aclrtStream) {
  end_without(name);
}

}  // extern "C"
