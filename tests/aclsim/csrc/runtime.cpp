// Initialisation, devices, contexts, versions; and what torch_npu calls at its start that has no effect here.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "simulator.h"

using namespace aclsim;

namespace {

const char* text_from(const char* variable, const char* otherwise) {
  const char* value = std::getenv(variable);
  return value == nullptr ? otherwise : value;
}

bool is_device(int index) { return index >= 0 && index < device_count(); }

int no_device(int index) {
  std::string words = "no device " + std::to_string(index);
  const char* const visible = std::getenv("ASCEND_RT_VISIBLE_DEVICES");
  if (visible != nullptr) {
    words += ": of ASCEND_RT_VISIBLE_DEVICES='" + std::string(visible) + "' " + std::to_string(device_count()) +
             " are seen (numbers ascend, with commas between)";
  }
  return refuse(ACL_ERROR_RT_INVALID_DEVICEID, words);
}

std::map<int, int64_t>& system_parameters() {
  static auto* const made = new std::map<int, int64_t>;
  return *made;
}

}  // namespace

extern "C" {

// ---- initialisation and errors ----------------------------------

aclError aclInit(const char*) {
  ACLSIM_ENTER();
  if (initialized()) return ACL_ERROR_REPEAT_INITIALIZE;
  set_initialized(true);
  return 0;
}

aclError aclFinalize() {
  const Guard guard(lock());
  set_initialized(false);
  return 0;
}

const char* aclGetRecentErrMsg() {
  static thread_local std::string words;
  words = take_error();
  return words.empty() ? nullptr : words.c_str();
}

aclError aclrtPeekAtLastError(aclrtLastErrLevel) { return 0; }
aclError aclrtGetLastError(aclrtLastErrLevel) { return 0; }
void aclAppLog(aclLogLevel, const char*, const char*, uint32_t, const char*, ...) {}
aclError aclmdlInitDump() { return 0; }
aclError aclmdlSetDump(const char*) { return 0; }
aclError aclmdlFinalizeDump() { return 0; }

// ---- versions ---------------------------------------------------

const char* aclrtGetSocName() { return text_from("ACLSIM_SOC", "Ascend910B3"); }

// Below 8.3 torch_npu initialises itself in an older way.
aclError aclsysGetCANNVersion(aclCANNPackageName, aclCANNPackageVersion* version) {
  std::memset(version, 0, sizeof *version);
  std::snprintf(version->version, sizeof version->version, "%s", text_from("ACLSIM_CANN", "8.5.0"));
  return 0;
}

aclError aclsysGetVersionStr(char*, char* version) {
  std::strcpy(version, text_from("ACLSIM_CANN", "8.5.0"));
  return 0;
}

aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo, int64_t* value) {
  *value = 20;
  return 0;
}

aclError aclrtGetDeviceInfo(uint32_t, aclrtDevAttr, int64_t* value) {
  *value = 20;
  return 0;
}

aclError aclrtDeviceGetUuid(int32_t index, aclrtUuid* uuid) {
  if (!is_device(index)) return no_device(index);
  std::memset(uuid, 0, sizeof *uuid);
  uuid->bytes[0] = static_cast<char>(device(index).physical + 1);
  return 0;
}

// ---- devices and contexts ---------------------------------------

aclError aclrtGetDeviceCount(uint32_t* count) {
  ACLSIM_ENTER();
  *count = static_cast<uint32_t>(device_count());
  return 0;
}

aclError aclrtSetDevice(int32_t index) {
  ACLSIM_ENTER();
  if (!is_device(index)) return no_device(index);
  choose_device(index);
  return 0;
}

aclError aclrtGetDevice(int32_t* index) {
  if (current_index() < 0) return ACL_ERROR_RT_CONTEXT_NULL;
  *index = current_index();
  return 0;
}

aclError aclrtResetDevice(int32_t) {
  const Guard guard(lock());
  return drain_all();
}

aclError aclrtGetCurrentContext(aclrtContext* context) {
  if (current_index() < 0) return ACL_ERROR_RT_CONTEXT_NULL;
  *context = &current_device();
  return 0;
}

aclError aclrtSetCurrentContext(aclrtContext context) {
  if (context == nullptr) return ACL_ERROR_RT_PARAM_INVALID;
  choose_device(static_cast<Device*>(context)->index);
  return 0;
}

aclError aclrtCreateContext(aclrtContext* context, int32_t index) {
  if (!is_device(index)) return no_device(index);
  choose_device(index);
  *context = &current_device();
  return 0;
}

aclError aclrtDestroyContext(aclrtContext) { return 0; }

aclError aclrtGetPrimaryCtxState(int32_t index, uint32_t* flags, int32_t* active) {
  if (flags != nullptr) *flags = 0;
  if (active != nullptr) *active = index == current_device().index && initialized() ? 1 : 0;
  return 0;
}

aclError aclrtDeviceGetBareTgid(int32_t* process) {
  *process = getpid();
  return 0;
}

aclError aclrtDeviceCanAccessPeer(int32_t* can, int32_t, int32_t) {
  *can = 1;
  return 0;
}

aclError aclrtDeviceEnablePeerAccess(int32_t, uint32_t) { return 0; }

aclError aclrtGetRunMode(aclrtRunMode* mode) {
  *mode = ACL_HOST;
  return 0;
}

// ---- settings ---------------------------------------------------

aclError aclrtSetSysParamOpt(aclSysParamOpt option, int64_t value) {
  const Guard guard(lock());
  system_parameters()[option] = value;
  return 0;
}

aclError aclrtCtxSetSysParamOpt(aclSysParamOpt option, int64_t value) { return aclrtSetSysParamOpt(option, value); }

aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t* value) {
  const Guard guard(lock());
  *value = system_parameters()[option];
  return 0;
}

aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode) { return 0; }
aclError aclrtSetOpExecuteTimeOut(uint32_t) { return 0; }
aclError aclrtSetOpWaitTimeout(uint32_t) { return 0; }
aclError aclrtSetStreamFailureMode(aclrtStream, uint64_t) { return 0; }
aclError aclrtSetStreamOverflowSwitch(aclrtStream, uint32_t) { return 0; }

aclError aclrtGetStreamOverflowSwitch(aclrtStream, uint32_t* flag) {
  *flag = 0;
  return 0;
}

aclError aclrtProcessReport(int32_t) {
  usleep(1000);
  return ACL_ERROR_RT_THREAD_SUBSCRIBE;
}

}  // extern "C"
