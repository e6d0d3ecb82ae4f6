// The memory that the ranks of a communicator share: a file without a name (memfd), so that nothing is left in
// /dev/shm however a rank ends. The root makes it; the others open it by the root's process and descriptor.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace hccl {

constexpr std::uint32_t kMaxRanks = 16;

// What a message is part of: the two ends of a channel must be of one mind, or data would be mistaken for other data.
struct Signature {
  char call[24];
  std::uint64_t bytes;  // of the whole message
  std::int32_t type, reduction;
  std::uint32_t root;

  bool operator==(const Signature& other) const;
  std::string words() const;
};

// From one rank to another: a slot for one piece of a message, full while `posted` is one ahead of `taken`.
struct Channel {
  alignas(64) std::atomic<std::uint64_t> posted;
  alignas(64) std::atomic<std::uint64_t> taken;
  std::atomic<std::uint32_t> awaited;  // the receiver waits
  std::uint64_t bytes;                 // of the piece
  Signature signature;

  bool full() const { return posted.load(std::memory_order_acquire) != taken.load(std::memory_order_acquire); }
};

// A process: its number alone may be another's by now.
struct Process {
  std::int32_t id;
  std::uint64_t start;

  static Process own();
  bool lives() const;
};

// Where a segment is found.
struct Place {
  Process process;
  int file;
  std::uint64_t nonce;
};

// A file to share, held open by this process until close_file().
Place make_file();
void close_file(const Place& place);
std::string to_text(const Place& place);
std::optional<Place> place_of(const std::string& text);

enum Presence : std::uint32_t { kAbsent, kArriving, kPresent, kLeft };

struct Member {
  std::atomic<std::uint32_t> presence;
  std::int32_t device;  // the physical one
  Process process;
};

// By which the first rank of a sub-communicator tells the others of the parent where its segment is.
struct Offer {
  std::atomic<std::uint32_t> ready;
  std::uint64_t key;
  Place place;
};
constexpr std::uint32_t kOffers = 8;

struct Header;

class Segment {
 public:
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;
  ~Segment();

  // Returns when all `size` ranks are there. Otherwise nullptr, and `words` says why.
  static Segment* join(const Place& place, std::uint32_t size, std::uint32_t rank, std::int32_t device,
                       std::chrono::seconds timeout, std::string* words);

  std::uint32_t size() const { return size_; }
  std::uint32_t rank() const { return rank_; }
  std::size_t slot_bytes() const { return slot_bytes_; }
  Channel& channel(std::uint32_t from, std::uint32_t to) const;
  char* slot(std::uint32_t from, std::uint32_t to) const;
  const Process& process(std::uint32_t rank) const;

  // Words of a peer that can answer no more; empty when it can.
  std::string loss(std::uint32_t rank) const;
  // The first failure of any rank, which ends the communicator for all.
  void fail(const std::string& words) const;
  std::string failure() const;
  void leave() const;

  // False: no place for an offer.
  bool offer(std::uint64_t key, const Place& place) const;
  void withdraw(std::uint64_t key) const;
  std::optional<Place> find_offer(std::uint32_t rank, std::uint64_t key) const;

 private:
  Segment(void* memory, std::size_t bytes, std::uint32_t size, std::uint32_t rank);
  Header& header() const;
  std::string claim(std::int32_t device) const;
  std::string missing(const Place& root) const;
  std::string shared_device() const;

  char* memory_;
  std::size_t bytes_;
  std::uint32_t size_, rank_;
  std::size_t slot_bytes_;
};

// Waits burn no core, for ranks outnumber cores in tests: short sleeps that grow.
class Nap {
 public:
  void take();

 private:
  int microseconds_ = 20;
};

}  // namespace hccl
