/* The pool's C ABI. Nothing throws across it: functions return a sleep_pool_code, and the thread's last
 * failure is read with sleep_pool_last_error. Sizes are bytes, times are seconds. */
#ifndef SLEEP_POOL_CAPI_H
#define SLEEP_POOL_CAPI_H

#include <stddef.h>
#include <stdint.h>

#define SLEEP_POOL_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

typedef struct sleep_pool sleep_pool;

enum sleep_pool_code {
  SLEEP_POOL_OK = 0,
  SLEEP_POOL_INVALID_ARGUMENT = 1,
  SLEEP_POOL_UNKNOWN_TAG = 2,
  SLEEP_POOL_TAG_ASLEEP = 3,
  SLEEP_POOL_PERSISTENT_TAG = 4,
  SLEEP_POOL_NO_REGION = 5,
  SLEEP_POOL_OUT_OF_MEMORY = 6,
  SLEEP_POOL_DRIVER = 7,
  SLEEP_POOL_FORKED = 8,
  SLEEP_POOL_INTERNAL = 9
};

/* The driver's calls, by which faults are injected and calls are counted. */
enum sleep_pool_call {
  SLEEP_POOL_RESERVE,
  SLEEP_POOL_UNRESERVE,
  SLEEP_POOL_CREATE,
  SLEEP_POOL_RELEASE,
  SLEEP_POOL_MAP,
  SLEEP_POOL_UNMAP,
  SLEEP_POOL_HOST_ALLOC,
  SLEEP_POOL_HOST_FREE,
  SLEEP_POOL_COPY_OUT,
  SLEEP_POOL_COPY_IN,
  SLEEP_POOL_MARK,
  SLEEP_POOL_WAIT,
  SLEEP_POOL_FILL,
  SLEEP_POOL_SYNCHRONIZE,
  SLEEP_POOL_MEMORY_INFO,
  SLEEP_POOL_CALLS
};

#define SLEEP_POOL_NAME_BYTES 128 /* of a tag, its terminator included */

typedef struct {
  int code;
  uint64_t pointer; /* the segment the failed call was for; 0 where there is none */
  uint64_t bytes;   /* that the failed call was for */
  uint64_t needed;  /* out of memory: bytes needed and free on the device */
  uint64_t free;
  char phase[32]; /* the driver's call, or the pool's operation */
  char tag[SLEEP_POOL_NAME_BYTES];
  char message[512];
} sleep_pool_error;

/* A tag's part of a sleep or a wake-up. Its parts run beside each other, so their seconds do not add up to all. */
typedef struct {
  double seconds;      /* from the operation's begin until the tag was done */
  double host_seconds; /* spent waiting for host memory to be made */
  double copy_seconds; /* from the first copy that was queued to the last that was waited for */
  double map_seconds;  /* spent in the driver's calls that take and give back physical memory */
  uint64_t bytes;      /* of physical memory given back or taken */
  uint64_t copied;     /* between the device and the host */
} sleep_pool_phase;

typedef struct {
  char tag[SLEEP_POOL_NAME_BYTES];
  uint64_t mapped; /* physical memory held */
  uint64_t asleep; /* addresses that hold none */
  uint64_t host;   /* backups, and arenas kept for the next one */
  uint64_t dead;   /* of mapped: in no live allocation */
  uint64_t live;   /* in live allocations, as they were asked for */
  uint64_t allocations;
  int is_asleep;
  int persistent;
  sleep_pool_phase sleep; /* the last one that moved something */
  sleep_pool_phase wake;
} sleep_pool_tag_stats;

/* The pool of a device and a namespace; made at the first call. device is torch's name of the type ("cpu").
 */
SLEEP_POOL_API int sleep_pool_open(const char* device, int index, const char* name_space, sleep_pool** pool);

/* Regions are the calling thread's: while one is open, its allocations go to the region's tag. The innermost
 * wins. A region is left by its number, on its thread. */
SLEEP_POOL_API int sleep_pool_enter(sleep_pool* pool, const char* tag, uint64_t* region);
SLEEP_POOL_API int sleep_pool_leave(sleep_pool* pool, uint64_t region);
SLEEP_POOL_API int sleep_pool_region_open(int device);

/* The pair a pluggable allocator takes. device is the index of the thread's region's device (-1: the CPU);
 * stream is not used. Malloc returns null when it fails. Free takes any thread and any time. */
SLEEP_POOL_API void* sleep_pool_malloc(size_t bytes, int device, void* stream);
SLEEP_POOL_API void sleep_pool_free(void* pointer, size_t bytes, int device, void* stream);
/* True for what the host driver handed out; takes no lock. */
SLEEP_POOL_API int sleep_pool_owns_host(const void* pointer);

SLEEP_POOL_API int sleep_pool_sleep_level(sleep_pool* pool, int level);
/* The droppable ranges are not copied though they live in tags to offload: they hold anything after the wake-up. */
SLEEP_POOL_API int sleep_pool_sleep(sleep_pool* pool, const char* const* offload, size_t offload_count,
                                    const char* const* discard, size_t discard_count,
                                    const uint64_t* droppable_addresses, const uint64_t* droppable_sizes,
                                    size_t droppable_count);
/* What sleep_pool_sleep would refuse; changes nothing. */
SLEEP_POOL_API int sleep_pool_check_sleep(sleep_pool* pool, const char* const* offload, size_t offload_count,
                                          const char* const* discard, size_t discard_count);
/* For who cuts allocations into smaller ones, as torch's caching allocators do: the ranges that live now. Only
 * they are copied from here on, of what has been allocated so far. Ranges outside the pool are passed over. */
SLEEP_POOL_API int sleep_pool_set_live(sleep_pool* pool, const uint64_t* addresses, const uint64_t* sizes,
                                       size_t count);

/* With all_or_nothing a failure leaves each tag as it was; otherwise what was woken before it stays awake. */
SLEEP_POOL_API int sleep_pool_wake_up(sleep_pool* pool, const char* const* tags, size_t count,
                                      int all_or_nothing);
SLEEP_POOL_API int sleep_pool_wake_up_all(sleep_pool* pool, int all_or_nothing);

SLEEP_POOL_API int sleep_pool_set_persistent(sleep_pool* pool, const char* tag, int persistent);
SLEEP_POOL_API int sleep_pool_require_resident(sleep_pool* pool, const char* tag);
/* Makes the host memory that offloading the tag as it is now will take. Other calls go on meanwhile. */
SLEEP_POOL_API int sleep_pool_prepare_host(sleep_pool* pool, const char* tag);
/* Returns host memory that holds no backup; how much is added up in released. */
SLEEP_POOL_API int sleep_pool_release_host(sleep_pool* pool, uint64_t* released);
/* Copies the backup of an address range of a sleeping tag. */
SLEEP_POOL_API int sleep_pool_read_backup(sleep_pool* pool, const char* tag, uint64_t address, uint64_t bytes,
                                          void* to);
/* Fills at most capacity entries, in the order the tags were made; count is how many tags there are. */
SLEEP_POOL_API int sleep_pool_stats(sleep_pool* pool, sleep_pool_tag_stats* stats, size_t capacity,
                                    size_t* count);
SLEEP_POOL_API int sleep_pool_memory_info(sleep_pool* pool, uint64_t* free_bytes, uint64_t* total_bytes);
/* What the device's physical memory comes in multiples of. */
SLEEP_POOL_API int sleep_pool_granularity(sleep_pool* pool, uint64_t* bytes);
SLEEP_POOL_API int sleep_pool_set_poison(sleep_pool* pool, int poison);

/* Of the device, so of all its namespaces. */
SLEEP_POOL_API int sleep_pool_set_capacity(sleep_pool* pool, uint64_t bytes);
SLEEP_POOL_API int sleep_pool_set_handle_bytes(sleep_pool* pool, uint64_t bytes);
/* Makes the nth driver call of this kind from now on fail, once; 0 takes the order back. */
SLEEP_POOL_API int sleep_pool_inject_fault(sleep_pool* pool, int call, uint64_t nth);
/* SLEEP_POOL_CALLS counters of driver calls that went well. */
SLEEP_POOL_API int sleep_pool_driver_calls(sleep_pool* pool, uint64_t* counters);
SLEEP_POOL_API const char* sleep_pool_call_name(int call);

/* The failure of this thread's last call that failed. */
SLEEP_POOL_API void sleep_pool_last_error(sleep_pool_error* error);

#ifdef __cplusplus
}
#endif
#endif
