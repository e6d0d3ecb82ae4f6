// Streams taken in turn, and events that stand for what was queued on one of them: how a driver makes tickets.
#pragma once

#include <array>
#include <cstddef>
#include <unordered_map>
#include <vector>

#include "driver.h"

namespace allocator {

template <typename Stream, typename Event>
class Lanes {
 public:
  std::array<Stream, 2>& streams() { return streams_; }
  Stream current() const { return streams_[turn_ % streams_.size()]; }

  // A ticket for what was queued on the current stream since the last one; the other stream is current afterwards.
  template <typename Create, typename Record>
  Status mark(Create create, Record record, Ticket* ticket) {
    if (idle_.empty()) {
      Event created = nullptr;
      if (Status status = create(&created); !status.ok()) return status;
      idle_.push_back(created);
    }
    Event event = idle_.back();
    if (Status status = record(event, current()); !status.ok()) return status;
    idle_.pop_back();
    recorded_.emplace(++turn_, event);
    *ticket = turn_;
    return {};
  }

  template <typename Synchronize>
  Status wait(Ticket ticket, Synchronize synchronize) {
    const auto found = recorded_.find(ticket);
    if (found == recorded_.end()) return {};  // all was waited for since
    Event event = found->second;
    recorded_.erase(found);
    idle_.push_back(event);
    return synchronize(event);
  }

  // All that was queued is done.
  void clear() {
    for (const auto& [ticket, event] : recorded_) idle_.push_back(event);
    recorded_.clear();
  }

 private:
  std::array<Stream, 2> streams_{};
  Ticket turn_ = 0;  // the last ticket
  std::unordered_map<Ticket, Event> recorded_;
  std::vector<Event> idle_;
};

}  // namespace allocator
