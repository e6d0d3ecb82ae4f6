#include "hccl_operation.h"

#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <list>
#include <mutex>
#include <set>
#include <thread>
#include <utility>

#include "acl/acl.h"
#include "control.h"
#include "hccl_reduction.h"

namespace hccl {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kBetweenChecks = std::chrono::milliseconds(50);

class Operation {
 public:
  Operation(std::shared_ptr<Communicator> communicator, Plan plan, void* stream)
      : stream(stream), communicator_(std::move(communicator)), plan_(std::move(plan)),
        number_(communicator_->issued.fetch_add(1)) {}

  // Moves what can be moved now. 0 when it is complete, kAclsimAgain when not, else the stream's error.
  int step();
  // Whether somebody waits for it: a peer does, or a later operation here.
  bool wanted() const;
  bool finished() const { return finished_; }

  void* const stream;

 private:
  bool begin();
  std::string fault() const;
  bool move();
  bool move(Message* message);
  bool send_piece(Message* message, Channel* channel);
  bool take_piece(Message* message, Channel* channel);
  bool reduce_piece();
  std::uint64_t piece_bytes(const Message& message) const;
  std::string loss();
  int finish(int error);
  int fail(int error, const std::string& words);
  Segment& segment() const { return *communicator_->segment; }

  const std::shared_ptr<Communicator> communicator_;
  Plan plan_;
  const std::uint64_t number_;
  bool begun_ = false;
  std::atomic<bool> finished_{false};
  std::string mismatch_;
  Clock::time_point start_, next_check_;
};

bool Operation::begin() {
  if (number_ != communicator_->finished) {
    communicator_->blocked = true;
    return false;
  }
  begun_ = true;
  start_ = Clock::now();
  next_check_ = start_ + kBetweenChecks;
  return true;
}

// Memory is looked at before each step: it may be put to sleep while an operation waits for its peers.
std::string Operation::fault() const {
  for (const Operand& operand : plan_.operands) {
    if (operand.bytes == 0) continue;
    const int found = aclsim_probe(operand.address, operand.bytes);
    if (found == 1) continue;
    return std::string(operand.name) + (found == 0 ? " has no memory behind it" : " is no device memory") + " (" +
           std::to_string(operand.bytes) + " bytes)";
  }
  return "";
}

int Operation::step() {
  if (!begun_ && !begin()) return kAclsimAgain;
  if (const std::string words = fault(); !words.empty()) return fail(ACL_ERROR_RT_DEVICE_MEM_ERROR, words);
  for (const Copy& copy : plan_.copies) std::memmove(copy.to, copy.from, copy.bytes);
  plan_.copies.clear();
  while (move()) continue;
  if (!mismatch_.empty()) return fail(ACL_ERROR_RT_INTERNAL_ERROR, mismatch_);
  const auto done = [](const Message& message) { return message.done; };
  if (std::all_of(plan_.messages.begin(), plan_.messages.end(), done)) return finish(0);
  if (const std::string words = segment().failure(); !words.empty()) return fail(ACL_ERROR_RT_FFTS_PLUS_TIMEOUT, words);
  if (Clock::now() < next_check_) return kAclsimAgain;
  next_check_ = Clock::now() + kBetweenChecks;
  // As of a notification that never comes (EI0002), which is how HCCL tells of a peer that is gone.
  if (const std::string words = loss(); !words.empty()) return fail(ACL_ERROR_RT_FFTS_PLUS_TIMEOUT, words);
  return kAclsimAgain;
}

bool Operation::wanted() const {
  if (begun_ || !segment().failure().empty()) return true;
  if (number_ != communicator_->finished) return false;
  if (communicator_->blocked) return true;
  return std::any_of(plan_.messages.begin(), plan_.messages.end(), [this](const Message& message) {
    if (!message.outgoing) return segment().channel(message.peer, communicator_->rank()).full();
    return segment().channel(communicator_->rank(), message.peer).awaited != 0;
  });
}

// True if something moved. Of several messages of a channel the first that is not done moves.
bool Operation::move() {
  bool moved = false;
  bool busy[2][kMaxRanks] = {};
  for (Message& message : plan_.messages) {
    bool& taken = busy[message.outgoing][message.peer];
    if (message.done || taken) continue;
    taken = true;
    moved = move(&message) || moved;
    if (!mismatch_.empty()) return false;
  }
  return reduce_piece() || moved;
}

bool Operation::move(Message* message) {
  const std::uint32_t own = communicator_->rank();
  if (message->outgoing) return send_piece(message, &segment().channel(own, message->peer));
  return take_piece(message, &segment().channel(message->peer, own));
}

std::uint64_t Operation::piece_bytes(const Message& message) const {
  return std::min<std::uint64_t>(message.signature.bytes - message.moved, segment().slot_bytes());
}

// A message is done when the peer has taken all of it: one of 0 bytes has a piece too, so that ranks wait for each other.
bool Operation::send_piece(Message* message, Channel* channel) {
  if (channel->full()) return false;
  if (message->pieces > 0 && message->moved == message->signature.bytes) return message->done = true;
  const std::uint64_t bytes = piece_bytes(*message);
  char* const slot = segment().slot(communicator_->rank(), message->peer);
  if (bytes > 0) std::memcpy(slot, message->memory + message->moved, bytes);
  channel->bytes = bytes;
  channel->signature = message->signature;
  channel->posted.fetch_add(1, std::memory_order_release);
  message->moved += bytes;
  ++message->pieces;
  return true;
}

bool Operation::take_piece(Message* message, Channel* channel) {
  if (!channel->full()) {
    channel->awaited = 1;
    return false;
  }
  if (!(channel->signature == message->signature)) {
    mismatch_ = "rank " + std::to_string(communicator_->rank()) + " calls " + message->signature.words() + ", rank " +
                std::to_string(message->peer) + " " + channel->signature.words();
    return false;
  }
  if (plan_.reduction) return false;  // reduce_piece() takes the pieces of all ranks together
  const char* const slot = segment().slot(message->peer, communicator_->rank());
  if (channel->bytes > 0) std::memcpy(message->memory + message->moved, slot, channel->bytes);
  message->moved += channel->bytes;
  message->done = message->moved == message->signature.bytes;
  channel->awaited = 0;
  channel->taken.fetch_add(1, std::memory_order_release);
  return true;
}

// In the order of ranks everywhere: every rank must get the same bits.
bool Operation::reduce_piece() {
  if (!plan_.reduction) return false;
  const Reduction& reduction = *plan_.reduction;
  const std::uint32_t own = communicator_->rank();
  std::vector<Message*> incoming(communicator_->size(), nullptr);
  for (Message& message : plan_.messages) {
    if (!message.outgoing) incoming[message.peer] = &message;
  }
  const Message& first = *incoming[own == 0 ? 1 : 0];
  if (first.done) return false;
  const std::uint64_t at = first.moved, bytes = piece_bytes(first);
  for (const Message& message : plan_.messages) {
    // What is reduced may lie where it came from, so it must have been sent.
    const bool ready = message.outgoing ? message.moved >= std::min(at + bytes, message.signature.bytes)
                                        : segment().channel(message.peer, own).full();
    if (!ready) return false;
  }
  std::vector<char> sum(bytes);
  for (std::uint32_t rank = 0; rank < communicator_->size() && bytes > 0; ++rank) {
    const char* const part = rank == own ? reduction.own + at : segment().slot(rank, own);
    if (rank == 0) {
      std::memcpy(sum.data(), part, bytes);
    } else {
      reduce(sum.data(), part, bytes, reduction.type, reduction.operation);
    }
  }
  if (bytes > 0) std::memcpy(reduction.to + at, sum.data(), bytes);
  for (Message* message : incoming) {
    if (message == nullptr) continue;
    Channel& channel = segment().channel(message->peer, own);
    message->moved += bytes;
    message->done = message->moved == message->signature.bytes;
    channel.awaited = 0;
    channel.taken.fetch_add(1, std::memory_order_release);
  }
  return true;
}

// Why it will never be complete; empty if it still may be.
std::string Operation::loss() {
  std::set<std::uint32_t> waited_for;
  for (const Message& message : plan_.messages) {
    if (message.done || !waited_for.insert(message.peer).second) continue;
    if (const std::string words = segment().loss(message.peer); !words.empty()) return words;
  }
  const std::chrono::seconds timeout = communicator_->execution_timeout;
  if (timeout.count() == 0 || Clock::now() - start_ < timeout) return "";
  std::string ranks;
  for (const std::uint32_t rank : waited_for) ranks += " " + std::to_string(rank);
  return "no answer from rank" + ranks + " within " + std::to_string(timeout.count()) + " s (HCCL_EXEC_TIMEOUT)";
}

int Operation::finish(int error) {
  finished_ = true;
  ++communicator_->finished;
  communicator_->blocked = false;
  return error;
}

int Operation::fail(int error, const std::string& words) {
  const std::string own = "rank " + std::to_string(communicator_->rank()) + ": " + plan_.call + ": " + words;
  segment().fail(own);
  aclsim_device_fault(error, "HCCL communicator " + communicator_->name + ", " + own);
  return finish(error);
}

// Operations that wait for peers go on in a thread of this process, as they would on the device, while its other
// threads do something else. On lazy streams they begin when somebody waits for them, which may be a peer.
class Progress {
 public:
  static Progress& get() {
    static auto* const made = new Progress;  // never destroyed: it runs until the process ends
    return *made;
  }

  void add(std::shared_ptr<Operation> operation) {
    const std::lock_guard<std::mutex> guard(mutex_);
    waiting_.push_back(std::move(operation));
    changed_.notify_one();
  }

 private:
  Progress() { std::thread(&Progress::run, this).detach(); }

  [[noreturn]] void run() {
    for (Nap nap;; nap.take()) {
      std::list<std::shared_ptr<Operation>> operations;
      {
        std::unique_lock<std::mutex> guard(mutex_);
        if (waiting_.empty()) {
          changed_.wait(guard, [this] { return !waiting_.empty(); });
          nap = Nap();
        }
        operations = waiting_;
      }
      for (const auto& operation : operations) {
        aclsim_advance(operation->stream, [&] {
          return operation->finished() || (aclsim_is_lazy() && !operation->wanted());
        });
      }
      const std::lock_guard<std::mutex> guard(mutex_);
      if (waiting_.remove_if([](const auto& operation) { return operation->finished(); }) > 0) nap = Nap();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::list<std::shared_ptr<Operation>> waiting_;
};

}  // namespace

HcclResult launch(std::shared_ptr<Communicator> communicator, Plan plan, void* stream) {
  static const bool log = std::getenv("ACLSIM_LOG_HCCL") != nullptr;
  if (log) std::fprintf(stderr, "[aclsim] %s on %s\n", plan.call.c_str(), communicator->name.c_str());
  if (aclsim_capture(stream) != 0) {
    const int error = aclsim_record(stream, [communicator, plan](void* on) {
      const auto operation = std::make_shared<Operation>(communicator, plan, on);
      Progress::get().add(operation);
      return [operation] { return operation->step(); };
    });
    return error == 0 ? HCCL_SUCCESS : HCCL_E_RUNTIME;
  }
  const auto operation = std::make_shared<Operation>(std::move(communicator), std::move(plan), aclsim_stream(stream));
  // Never run by the call itself: an error is the stream's, as on the device. torch_npu makes the call in a thread of its
  // own, where its failure would be nobody's.
  const int error = aclsim_enqueue(stream, [operation, queued = aclsim_is_lazy()]() mutable {
    return std::exchange(queued, true) ? operation->step() : kAclsimAgain;
  });
  if (!operation->finished()) Progress::get().add(operation);
  return error == 0 ? HCCL_SUCCESS : HCCL_E_RUNTIME;
}

}  // namespace hccl
