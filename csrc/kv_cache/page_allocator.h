// The page allocator of a paged KV cache: which sequence has which pages, and which sequences share them. It only does the
// bookkeeping; pages are not touched here. Not thread-safe: callers hold the GIL.

#pragma once

#include <cstdint>
#include <stdexcept>
#include <unordered_map>
#include <utility>
#include <vector>

namespace fastgpt {

struct OutOfPages : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class PageAllocator {
 public:
  // What the caller must do after an append, in this order.
  struct Changes {
    std::vector<int64_t> copy_from, copy_to;    // pages to copy
    std::vector<int64_t> rows, columns, pages;  // block_table[row, column] = page; row: index in the append's list
  };

  struct Statistics {
    int64_t free_pages, shared_pages, sequences, tokens;
  };

  struct Sequence {
    int64_t length = 0;
    std::vector<int64_t> pages;
  };

  PageAllocator(int64_t num_pages, int64_t page_size);

  // Restores the state that the functions below return. Throws std::invalid_argument if it is inconsistent.
  PageAllocator(
      int64_t num_pages, int64_t page_size, int64_t next_sequence, std::vector<int64_t> free_pages,
      std::unordered_map<int64_t, Sequence> sequences);
  int64_t next_sequence() const { return next_sequence_; }
  const std::vector<int64_t>& free_pages() const { return free_; }
  const std::unordered_map<int64_t, Sequence>& sequences() const { return sequences_; }

  int64_t num_pages() const { return static_cast<int64_t>(owners_.size()); }
  int64_t page_size() const { return page_size_; }

  // Creates an empty sequence. Returns its number, which is never reused.
  int64_t allocate();

  // Creates a sequence with the tokens of another, whose pages it shares.
  int64_t fork(int64_t sequence);

  // Removes a sequence; pages that no other sequence shares become free.
  void free(int64_t sequence);

  // Reserves slots for counts[i] more tokens of sequences[i], which are distinct. A shared page that would be written is
  // replaced by a copy (copy-on-write). Throws OutOfPages before anything has changed.
  Changes append(const std::vector<int64_t>& sequences, const std::vector<int64_t>& counts);

  // Removes all but the first `length` tokens; pages that no other sequence shares become free.
  void truncate(int64_t sequence, int64_t length);

  int64_t length(int64_t sequence) const { return find(sequence).length; }
  const std::vector<int64_t>& pages(int64_t sequence) const { return find(sequence).pages; }
  Statistics statistics() const;

 private:
  const Sequence& find(int64_t sequence) const;
  Sequence& find(int64_t sequence) { return const_cast<Sequence&>(std::as_const(*this).find(sequence)); }
  int64_t take();
  int64_t pages_for(int64_t tokens) const { return (tokens + page_size_ - 1) / page_size_; }
  void release(int64_t page);

  int64_t page_size_;
  std::vector<int64_t> owners_;  // reference count of each page
  std::vector<int64_t> free_;    // the last one is taken first
  std::unordered_map<int64_t, Sequence> sequences_;
  int64_t next_sequence_ = 0;
};

}  // namespace fastgpt
