#include "hccl_segment.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <memory>
#include <random>
#include <sstream>

namespace hccl {

struct Header {
  std::atomic<std::uint64_t> nonce;
  std::atomic<std::uint32_t> size;
  std::atomic<std::uint32_t> failed;  // 1: the words are being written, 2: they are there
  char failure[1024];
  Member members[kMaxRanks];
  Offer offers[kMaxRanks][kOffers];
};

namespace {

constexpr std::size_t kHeaderBytes = (sizeof(Header) + 4095) / 4096 * 4096;
constexpr std::size_t kSlotsOfARank = std::size_t{1} << 20;  // bytes; to all peers together

std::size_t slot_bytes_of(std::uint32_t size) { return kSlotsOfARank / std::max(size, 2U) / 4096 * 4096; }

std::size_t channels_bytes(std::uint32_t size) { return (size * size * sizeof(Channel) + 4095) / 4096 * 4096; }

std::size_t bytes_of(std::uint32_t size) {
  return kHeaderBytes + channels_bytes(size) + size * size * slot_bytes_of(size);
}

// Fields of /proc/PID/stat from the third, which is the state.
std::vector<std::string> process_fields(std::int32_t id) {
  std::ifstream file("/proc/" + std::to_string(id) + "/stat");
  std::string line;
  std::getline(file, line);
  const std::size_t name_end = line.rfind(')');
  if (name_end == std::string::npos) return {};
  std::istringstream rest(line.substr(name_end + 1));
  std::vector<std::string> fields;
  for (std::string field; rest >> field;) fields.push_back(field);
  return fields;
}

constexpr std::size_t kState = 0;
constexpr std::size_t kStartTime = 19;

std::string system_words(const std::string& what) { return what + ": " + std::strerror(errno); }

std::string name_of(std::uint32_t rank, const Process& process) {
  return "rank " + std::to_string(rank) + " (process " + std::to_string(process.id) + ")";
}

struct File {
  explicit File(int number) : number(number) {}
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File() {
    if (number >= 0) close(number);
  }
  const int number;
};

}  // namespace

bool Signature::operator==(const Signature& other) const {
  return std::strcmp(call, other.call) == 0 && bytes == other.bytes && type == other.type &&
         reduction == other.reduction && root == other.root;
}

std::string Signature::words() const {
  return std::string(call) + " of " + std::to_string(bytes) + " bytes, data type " + std::to_string(type) +
         ", reduction " + std::to_string(reduction) + ", root " + std::to_string(root);
}

Process Process::own() {
  const std::vector<std::string> fields = process_fields(getpid());
  return {getpid(), fields.size() > kStartTime ? std::stoull(fields[kStartTime]) : 0};
}

bool Process::lives() const {
  const std::vector<std::string> fields = process_fields(id);
  if (fields.size() <= kStartTime || std::stoull(fields[kStartTime]) != start) return false;
  return fields[kState] != "Z" && fields[kState] != "X";  // killed, but its parent has not asked for it yet
}

Place make_file() {
  std::random_device random;
  const std::uint64_t nonce = (std::uint64_t{random()} << 32 | random()) | 1;
  const int file = memfd_create("aclsim-hccl", MFD_CLOEXEC);
  if (file >= 0 && pwrite(file, &nonce, sizeof nonce, 0) != sizeof nonce) {
    close(file);
    return {Process::own(), -1, 0};
  }
  return {Process::own(), file, nonce};
}

void close_file(const Place& place) { close(place.file); }

std::string to_text(const Place& place) {
  std::ostringstream text;
  text << "aclsim-hccl " << place.process.id << ' ' << place.process.start << ' ' << place.file << ' ' << place.nonce;
  return text.str();
}

std::optional<Place> place_of(const std::string& text) {
  std::istringstream in(text);
  std::string kind;
  Place place{};
  in >> kind >> place.process.id >> place.process.start >> place.file >> place.nonce;
  if (!in || kind != "aclsim-hccl") return std::nullopt;
  return place;
}

Segment::Segment(void* memory, std::size_t bytes, std::uint32_t size, std::uint32_t rank)
    : memory_(static_cast<char*>(memory)), bytes_(bytes), size_(size), rank_(rank), slot_bytes_(slot_bytes_of(size)) {}

Segment::~Segment() { munmap(memory_, bytes_); }

Header& Segment::header() const { return *reinterpret_cast<Header*>(memory_); }

Channel& Segment::channel(std::uint32_t from, std::uint32_t to) const {
  return reinterpret_cast<Channel*>(memory_ + kHeaderBytes)[from * size_ + to];
}

char* Segment::slot(std::uint32_t from, std::uint32_t to) const {
  return memory_ + kHeaderBytes + channels_bytes(size_) + (from * size_ + to) * slot_bytes_;
}

const Process& Segment::process(std::uint32_t rank) const { return header().members[rank].process; }

// Takes this rank's place; words when it cannot.
std::string Segment::claim(std::int32_t device) const {
  std::uint32_t agreed = 0;
  if (!header().size.compare_exchange_strong(agreed, size_) && agreed != size_) {
    return "a communicator of " + std::to_string(size_) + " ranks here, of " + std::to_string(agreed) + " elsewhere";
  }
  Member& own = header().members[rank_];
  std::uint32_t presence = kAbsent;
  if (!own.presence.compare_exchange_strong(presence, kArriving)) {
    return "rank " + std::to_string(rank_) + " is there twice";
  }
  own.device = device;
  own.process = Process::own();
  own.presence = kPresent;
  return "";
}

std::string Segment::missing(const Place& root) const {
  std::string absent;
  for (std::uint32_t rank = 0; rank < size_; ++rank) {
    const Member& member = header().members[rank];
    if (member.presence < kPresent) {
      absent += (absent.empty() ? "" : ", ") + std::to_string(rank);
    } else if (const std::string words = loss(rank); member.presence == kPresent && !words.empty()) {
      fail(words);
    }
  }
  if (!absent.empty() && !root.process.lives()) fail("the process of the root rank has died");
  return absent;
}

// HCCL wants a device for each rank; words when two have the same.
std::string Segment::shared_device() const {
  for (std::uint32_t one = 0; one < size_; ++one) {
    for (std::uint32_t other = one + 1; other < size_; ++other) {
      const std::int32_t device = header().members[one].device;
      if (device != header().members[other].device) continue;
      return "ranks " + std::to_string(one) + " and " + std::to_string(other) + " are both on device " +
             std::to_string(device) + ": HCCL wants a device for each";
    }
  }
  return "";
}

Segment* Segment::join(const Place& place, std::uint32_t size, std::uint32_t rank, std::int32_t device,
                       std::chrono::seconds timeout, std::string* words) {
  const std::string path = "/proc/" + std::to_string(place.process.id) + "/fd/" + std::to_string(place.file);
  const bool root_lives = place.process.lives();
  const File file(open(path.c_str(), O_RDWR | O_CLOEXEC));
  if (!root_lives || file.number < 0) {
    *words = root_lives ? system_words("cannot open " + path) : "the process of the root rank has died";
    return nullptr;
  }
  struct stat status {};
  std::uint64_t nonce = 0;
  if (pread(file.number, &nonce, sizeof nonce, 0) != sizeof nonce || nonce != place.nonce) {
    *words = "the root information is of a communicator that is no more";
    return nullptr;
  }
  const std::size_t bytes = bytes_of(size);
  if (fstat(file.number, &status) != 0 || (status.st_size < static_cast<off_t>(bytes) &&
                                           ftruncate(file.number, static_cast<off_t>(bytes)) != 0)) {
    *words = system_words("no shared memory");
    return nullptr;
  }
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.number, 0);
  if (memory == MAP_FAILED) {
    *words = system_words("no shared memory");
    return nullptr;
  }
  std::unique_ptr<Segment> segment(new Segment(memory, bytes, size, rank));
  *words = segment->claim(device);
  if (!words->empty()) {
    segment->fail(*words);
    return nullptr;
  }
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  for (Nap nap;; nap.take()) {
    const std::string absent = segment->missing(place);
    if (absent.empty()) break;
    if (std::chrono::steady_clock::now() > deadline) {
      segment->fail("ranks " + absent + " of " + std::to_string(size) + " did not come within " +
                    std::to_string(timeout.count()) + " s (HCCL_CONNECT_TIMEOUT)");
    }
    *words = segment->failure();
    if (!words->empty()) return nullptr;
  }
  if (const std::string shared = segment->shared_device(); !shared.empty()) segment->fail(shared);
  *words = segment->failure();
  return words->empty() ? segment.release() : nullptr;
}

std::string Segment::loss(std::uint32_t rank) const {
  const Member& member = header().members[rank];
  if (!member.process.lives()) return name_of(rank, member.process) + " has died";
  if (member.presence == kLeft) return name_of(rank, member.process) + " has destroyed the communicator";
  return "";
}

void Segment::fail(const std::string& words) const {
  std::uint32_t none = 0;
  if (!header().failed.compare_exchange_strong(none, 1)) return;
  std::snprintf(header().failure, sizeof header().failure, "%s", words.c_str());
  header().failed = 2;
}

std::string Segment::failure() const { return header().failed == 2 ? header().failure : ""; }

void Segment::leave() const { header().members[rank_].presence = kLeft; }

bool Segment::offer(std::uint64_t key, const Place& place) const {
  for (Offer& offer : header().offers[rank_]) {
    if (offer.ready != 0) continue;
    offer.key = key;
    offer.place = place;
    offer.ready = 1;
    return true;
  }
  return false;
}

void Segment::withdraw(std::uint64_t key) const {
  for (Offer& offer : header().offers[rank_]) {
    if (offer.ready != 0 && offer.key == key) offer.ready = 0;
  }
}

std::optional<Place> Segment::find_offer(std::uint32_t rank, std::uint64_t key) const {
  for (const Offer& offer : header().offers[rank]) {
    if (offer.ready != 0 && offer.key == key) return offer.place;
  }
  return std::nullopt;
}

void Nap::take() {
  usleep(static_cast<useconds_t>(microseconds_));
  microseconds_ = std::min(microseconds_ + microseconds_ / 4, 1000);
}

}  // namespace hccl
