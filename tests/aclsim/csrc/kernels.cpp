// Kernels that programs bring along as binaries for the NPU's cores. None can run here: a binary may be loaded, as
// vllm-ascend's is when its library is, but a launch fails, is counted, and leaves its stream with a device fault.
#include <cxxabi.h>
#include <dlfcn.h>
#include <execinfo.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>

#include "simulator.h"

namespace aclsim {
namespace {

constexpr int kDeviceFault = 507015;
char loaded;  // its address stands for every binary and function

std::string name_of(const void* address) {
  Dl_info found{};
  if (dladdr(address, &found) == 0 || found.dli_sname == nullptr) return "";
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> readable(
      abi::__cxa_demangle(found.dli_sname, nullptr, nullptr, &status), &std::free);
  return status == 0 ? readable.get() : found.dli_sname;
}

// The nearest function with a name beyond this library: those that launch kernels are called after them.
std::string launcher() {
  constexpr int kFrames = 8;
  void* frames[kFrames];
  const int count = backtrace(frames, kFrames);
  for (int i = 3; i < count; ++i) {
    std::string name = name_of(frames[i]);
    if (!name.empty()) return name;
  }
  return "a function without a name";
}

int refuse_kernel(const char* call, void* stream) {
  const std::string words = std::string(call) + ": no kernel is simulated, and one was launched by " + launcher();
  std::fprintf(stderr, "[aclsim] %s: add a reference to tests/aclsim/python/simulated_npu\n", words.c_str());
  int& error = stream_of(stream)->error;  // of the work that waits now or comes next
  if (error == 0) error = kDeviceFault;
  return refuse(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, words);
}

}  // namespace
}  // namespace aclsim

using namespace aclsim;

extern "C" {

aclError aclrtBinaryLoadFromData(const void*, size_t, const aclrtBinaryLoadOptions*, aclrtBinHandle* binary) {
  ACLSIM_ENTER();
  *binary = &loaded;
  return 0;
}

aclError aclrtBinaryUnLoad(aclrtBinHandle) { return 0; }

aclError aclrtBinaryGetFunction(const aclrtBinHandle, const char* name, aclrtFuncHandle*) {
  ACLSIM_ENTER();
  const std::string words = std::string("aclrtBinaryGetFunction: no kernel is simulated, nor is ") + name;
  return refuse(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, words);
}

aclError aclrtBinaryGetFunctionByEntry(aclrtBinHandle, uint64_t, aclrtFuncHandle* function) {
  ACLSIM_ENTER();
  *function = &loaded;
  return 0;
}

aclError aclrtGetFunctionAddr(aclrtFuncHandle, void**, void**) {
  ACLSIM_ENTER();
  return refuse(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "aclrtGetFunctionAddr: no kernel is simulated");
}

aclError aclrtGetHardwareSyncAddr(void** address) {
  ACLSIM_ENTER();
  *address = nullptr;  // nothing reads it: the launch that it is an argument of is refused
  return 0;
}

aclError aclrtLaunchKernelWithHostArgs(aclrtFuncHandle, uint32_t, aclrtStream stream, aclrtLaunchKernelCfg*, void*,
                                       size_t, aclrtPlaceHolderInfo*, size_t) {
  ACLSIM_ENTER();
  return refuse_kernel(__func__, stream);
}

aclError aclrtMemcpyBatchAsync(void**, size_t*, void**, size_t*, size_t, aclrtMemcpyBatchAttr*, size_t*, size_t,
                               size_t*, aclrtStream) {
  ACLSIM_ENTER();
  return refuse(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "aclrtMemcpyBatchAsync is not simulated");
}

aclError aclrtLaunchHostFunc(aclrtStream stream, aclrtHostFunc function, void* data) {
  ACLSIM_ENTER();
  return enqueue(stream_of(stream), [function, data] {
    function(data);
    return 0;
  });
}

// The runtime's own interface, which no header declares; what AscendCL's of the same name would do.
int rtDevBinaryRegister(const void*, void** binary) {
  *binary = &loaded;
  return 0;
}

int rtFunctionRegister(void*, const void*, const char*, const void*, uint32_t) { return 0; }

int rtFunctionGetMetaInfo(void*, int, void*, uint32_t) {
  ACLSIM_ENTER();
  return refuse(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "rtFunctionGetMetaInfo: no kernel is simulated");
}

int rtFunctionGetMetaInfoSize(void*, int, uint32_t* bytes) {
  *bytes = 0;
  return 0;
}

int rtGetC2cCtrlAddr(uint64_t*, uint32_t*) {
  ACLSIM_ENTER();
  return refuse(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "rtGetC2cCtrlAddr: no kernel is simulated");
}

int rtKernelLaunch(const void*, uint32_t, void*, uint32_t, void*, void* stream) {
  ACLSIM_ENTER();
  return refuse_kernel(__func__, stream);
}

}  // extern "C"
