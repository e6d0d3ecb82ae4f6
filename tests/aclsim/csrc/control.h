// What tests ask of the simulator: none of this is AscendCL's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

// What a task returns that cannot go on yet: it is run again later, and its stream waits until then.
constexpr int kAclsimAgain = -1;

struct aclsim_range {
  void* first;
  std::size_t bytes;
};

// Runs an operator in order on a simulated stream. A task that names what it writes is also run while it is captured.
int aclsim_enqueue(void* stream, std::function<int()> task, const std::vector<aclsim_range>& writes = {});
// What becomes of work on the stream: 0, it is run.
constexpr int kAclsimCapturing = 1;
constexpr int kAclsimUpdating = 2;
int aclsim_capture(void* stream);
// Of a capturing stream: a task that cannot run twice. It is made anew for each replay, when that is enqueued.
using AclsimMake = std::function<std::function<int()>(void* stream)>;
int aclsim_record(void* stream, AclsimMake make);
// Before a write during a capture: the memory is as it was when the capture has ended.
void aclsim_save(void* stream, void* first, std::size_t bytes);
// The calling thread's default stream for nullptr.
void* aclsim_stream(void* stream);
// Runs what the stream can run now, until `enough` says so. Both tasks and `enough` run under the simulator's lock.
void aclsim_advance(void* stream, const std::function<bool()>& enough);
bool aclsim_is_lazy();
void aclsim_count_error();
// Words for aclGetRecentErrMsg: of a call that this thread made; of a task, which any thread may ask for. Both count
// the error and return its code.
int aclsim_refuse(int code, const std::string& words);
int aclsim_device_fault(int code, const std::string& words);
// Of the calling thread: which of the machine's devices its current one is (ASCEND_RT_VISIBLE_DEVICES renumbers them).
int aclsim_physical_device();
// Counts a refused call; a fault: one for want of memory behind an operand. aclGetRecentErrMsg gives the words next.
void aclsim_report_error(const std::string& words);
void aclsim_report_fault(const std::string& words);

extern "C" {

struct aclsim_stats {
  std::uint64_t capacity;       // bytes of device memory
  std::uint64_t used;           // of it, by any call
  std::uint64_t used_physical;  // by aclrtMallocPhysical
  std::uint64_t used_malloc;    // by aclrtMalloc and its like
  std::uint64_t host;           // bytes held by aclrtMallocHost, of the whole process
  std::uint64_t reserved;       // bytes of addresses, of the whole process
  std::uint64_t mapped;         // bytes of them with memory behind, of the whole process
  std::uint64_t errors;         // calls that were refused, and device faults
  std::uint64_t faults;         // work that touched device addresses without memory behind
  std::uint64_t undefined;      // copies whose outcome AscendCL leaves open: ends not aligned, or host memory not its own
  std::uint64_t pending;        // tasks not run yet
};

void aclsim_get_stats(int device, aclsim_stats* stats);
void aclsim_set_capacity(int device, std::uint64_t bytes);
// Makes the nth call from now of a function (or of the task "memcpy" on a stream) fail with a code, once; 0 takes
// that back.
void aclsim_fail(const char* call, int nth, int code);
// How often a function was called, failed calls included.
std::uint64_t aclsim_calls(const char* call);
// 1: all of the range is device memory; 0: some of it is a device address without memory; -1: no device address.
int aclsim_probe(const void* address, std::size_t bytes);
// Zeros device memory. Whole pages are given back to the system: they read as zeros, and cost nothing until written.
void aclsim_clear(void* first, std::size_t bytes);
}
