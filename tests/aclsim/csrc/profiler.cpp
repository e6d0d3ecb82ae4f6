// Profiler entry points that libtorch_npu.so links to; none has an effect.
#include <atomic>
#include <functional>
#include <string>

#include "profiling/aprof_pub.h"

extern "C" {

int32_t MsprofRegisterCallback(uint32_t, ProfCommandHandle) { return 0; }
int32_t MsprofReportApi(uint32_t, const struct MsprofApi*) { return 0; }
int32_t MsprofReportCompactInfo(uint32_t, const VOID_PTR, uint32_t) { return 0; }
int32_t MsprofReportAdditionalInfo(uint32_t, const VOID_PTR, uint32_t) { return 0; }
uint64_t MsprofGetHashId(const char* text, size_t bytes) { return std::hash<std::string>{}({text, bytes}); }

uint64_t MsprofSysCycleTime() {
  static std::atomic<uint64_t> cycles{0};
  return ++cycles;
}

}  // extern "C"
