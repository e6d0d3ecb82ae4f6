// A collective or point-to-point operation: messages between ranks, piece by piece, on a simulated stream.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "hccl/hccl_types.h"
#include "hccl_segment.h"

namespace hccl {

struct Communicator {
  std::unique_ptr<Segment> segment;
  std::string name;
  std::chrono::seconds execution_timeout;  // 0: none
  // Operations of a communicator run in the order in which they were issued, whatever their streams.
  std::atomic<std::uint64_t> issued{0};
  std::uint64_t finished = 0;
  bool blocked = false;  // a later operation waits for an earlier one
  // Of sub-communicators: how many times each was made.
  std::vector<std::uint64_t> made;

  std::uint32_t size() const { return segment->size(); }
  std::uint32_t rank() const { return segment->rank(); }
};

struct Operand {
  const char* name;
  const void* address;
  std::uint64_t bytes;
};

// One message to a peer or from it. Memory of a message that comes to be reduced is nullptr.
struct Message {
  std::uint32_t peer;
  bool outgoing;
  char* memory;
  Signature signature;
  std::uint64_t moved = 0;  // bytes
  std::uint64_t pieces = 0;
  bool done = false;
};

struct Copy {
  void* to;
  const void* from;
  std::uint64_t bytes;
};

struct Reduction {
  char* to;
  const char* own;
  std::uint64_t bytes;
  HcclDataType type;
  HcclReduceOp operation;
};

struct Plan {
  std::string call;
  std::vector<Operand> operands;
  std::vector<Message> messages;
  std::vector<Copy> copies;
  std::optional<Reduction> reduction;
};

// Puts it on the stream, which has its error if it fails.
HcclResult launch(std::shared_ptr<Communicator> communicator, Plan plan, void* stream);

}  // namespace hccl
