// Memory of large results. New memory is cleared by the system page by page at its first touch, which takes longer than
// most kernels take to fill it: several times as long with pages of 4 KiB, and longer still on a virtual machine whose
// host has taken unused pages back. So large results lie in huge pages where the system grants them, and what a result
// leaves behind is kept for the next one. The system may take the pages of a kept block whenever it runs short of
// memory (MADV_FREE); until then they count as resident. Storages of such tensors are those of torch.from_blob: torch
// refuses to resize them (resize_, out= of another size, untyped_storage().resize_). Before torch 2.11 there are no
// such tensors: huge pages are asked for all the same, in torch's own memory, but nothing is kept.
#pragma once

#include <cstddef>

namespace maskops {

// From here on. glibc keeps smaller results than 32 MiB itself, but returns what lies at the end of its heap: a
// training step with several results of 12 MiB faulted in every page of them anew.
constexpr size_t LARGE_BYTES = size_t{8} << 20;

// Writable memory of at least so many bytes that begins at a huge page; its contents are anything. nullptr where there
// is none to be had, or on another system than Linux. `size` is what give_back_large is to be told.
void* take_large(size_t bytes, size_t* size);
void give_back_large(void* begin, size_t size) noexcept;

// Returns what is kept to the system; how many bytes that were.
size_t release_large() noexcept;

}  // namespace maskops
