// libacl_op_compiler.so: the older operator interface, which torch_npu falls back to for an operator that libopapi.so
// lacks. It can compile nothing. torch_npu raises once and then drops every later operator without a word: tests
// assert that aclsim_stats.errors is what they expect.
#include "acl/acl_op_compiler.h"

#include <cstdio>
#include <map>
#include <string>

#include "acl/acl.h"
#include "control.h"

namespace {

std::map<int, std::string>& options() {
  static auto* const made = new std::map<int, std::string>;
  return *made;
}

std::string option(int key) {
  const auto found = options().find(key);
  return found == options().end() ? "disable" : found->second;
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
  std::fprintf(stderr, "simulated AscendCL has no operator %s: add it to tests/aclsim/csrc/operators.cpp\n", name);
  aclsim_count_error();
  return ACL_ERROR_OP_NOT_FOUND;
}

}  // extern "C"
