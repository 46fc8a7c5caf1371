// Virtual memory of the driver, for expandable segments: reserved addresses, and memory that is mapped to them.
#include <cuda.h>
#include <sys/mman.h>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include "mock_graphs.h"
#define GRANULARITY (2ull << 20)
struct Memory {
    size_t size;
    int device;
};
static std::mutex mu;
static std::map<CUmemGenericAllocationHandle, Memory> memories;
static CUmemGenericAllocationHandle last = 0;
static CUresult reserve(CUdeviceptr* address, size_t size, size_t, CUdeviceptr, unsigned long long) {
    // Aligned, for a page of 2 MiB is what is mapped.
    char* raw = (char*)mmap(nullptr, size + GRANULARITY, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    char* aligned = (char*)(((size_t)raw + GRANULARITY - 1) / GRANULARITY * GRANULARITY);
    *address = (CUdeviceptr)aligned;
    return CUDA_SUCCESS;
}
static CUresult unreserve(CUdeviceptr address, size_t size) {
    munmap((void*)address, size);
    return CUDA_SUCCESS;
}
static CUresult create(CUmemGenericAllocationHandle* handle, size_t size, const CUmemAllocationProp* properties,
                       unsigned long long) {
    const char* maps = getenv("MOCK_CUDA_MAPS");  // 0: as a virtual GPU that does not
    if (maps && *maps == '0') return CUDA_ERROR_NOT_SUPPORTED;
    std::lock_guard<std::mutex> lock(mu);
    *handle = last + 1;
    if (!mock_take((void*)*handle, size, properties->location.id)) return CUDA_ERROR_OUT_OF_MEMORY;
    memories[++last] = {size, properties->location.id};
    return CUDA_SUCCESS;
}
static CUresult release(CUmemGenericAllocationHandle) { return CUDA_SUCCESS; }  // it lives while it is mapped
static std::map<CUdeviceptr, CUmemGenericAllocationHandle> mapped;
static CUresult map(CUdeviceptr address, size_t, size_t, CUmemGenericAllocationHandle handle, unsigned long long) {
    std::lock_guard<std::mutex> lock(mu);
    mapped[address] = handle;
    return CUDA_SUCCESS;
}
static CUresult unmap(CUdeviceptr address, size_t size) {
    std::lock_guard<std::mutex> lock(mu);
    for (auto it = mapped.lower_bound(address); it != mapped.end() && it->first < address + size;
         it = mapped.erase(it)) {
        mock_give((void*)it->second);
        memories.erase(it->second);
    }
    return CUDA_SUCCESS;
}
bool mock_is_mapped(const void* address) {
    std::lock_guard<std::mutex> lock(mu);
    auto it = mapped.upper_bound((CUdeviceptr)address);
    if (it == mapped.begin()) return false;
    --it;
    return (CUdeviceptr)address < it->first + memories[it->second].size;
}
static CUresult access(CUdeviceptr, size_t, const CUmemAccessDesc*, size_t) { return CUDA_SUCCESS; }
static CUresult granularity(size_t* size, const CUmemAllocationProp*, CUmemAllocationGranularity_flags) {
    *size = GRANULARITY;
    return CUDA_SUCCESS;
}
static CUresult error_string(CUresult error, const char** text) {
    *text = error == CUDA_ERROR_NOT_SUPPORTED ? "operation not supported" : "mock";
    return CUDA_SUCCESS;
}
void* mock_driver(const char* name) {
    struct {
        const char* name;
        void* function;
    } known[] = {{"cuGetErrorString", (void*)error_string},
                 {"cuMemAddressReserve", (void*)reserve},
                 {"cuMemAddressFree", (void*)unreserve},
                 {"cuMemCreate", (void*)create},
                 {"cuMemRelease", (void*)release},
                 {"cuMemMap", (void*)map},
                 {"cuMemUnmap", (void*)unmap},
                 {"cuMemSetAccess", (void*)access},
                 {"cuMemGetAllocationGranularity", (void*)granularity}};
    for (auto& one : known)
        if (!strcmp(name, one.name)) return one.function;
    return nullptr;
}
