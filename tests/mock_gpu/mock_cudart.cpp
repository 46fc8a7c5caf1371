// A CUDA runtime without a GPU: allocations are reserved addresses that nobody may touch, kernels and copies do
// nothing, copies to the host give zeros. LD_PRELOAD goes before libcudart, libcublas, libnccl.
#include "mock_graphs.h"
#include <sys/mman.h>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
static std::atomic<long> launches{0};
static std::mutex mu;
static std::map<char*, size_t> dev, host;  // address -> size
static std::map<char*, int> devidx;
static size_t used[16];
static thread_local int current = 0;
static std::set<int> contexts;  // devices touched by allocation or stream
static int ndev() {
    const char* e = getenv("MOCK_CUDA_DEVICES");
    return e ? atoi(e) : 1;
}
static size_t total() {
    const char* e = getenv("MOCK_CUDA_GIB");
    return (size_t)((e ? atof(e) : 23.57) * (1ull << 30));
}
static size_t context_bytes() {
    const char* e = getenv("MOCK_CUDA_CONTEXT_GIB");
    return (size_t)((e ? atof(e) : 0.30) * (1ull << 30));
}
API long mock_count(int) { return launches; }
static bool inside(std::map<char*, size_t>& m, const void* p) {
    std::lock_guard<std::mutex> l(mu);
    auto it = m.upper_bound((char*)p);
    if (it == m.begin()) return false;
    --it;
    return (char*)p < it->first + (it->second ? it->second : 1);
}
bool mock_is_mapped(const void* address);
static bool on_device(const void* p) { return inside(dev, p) || mock_is_mapped(p); }
API cudaError_t cudaGetDeviceCount(int* n) {
    *n = ndev();
    return cudaSuccess;
}
API cudaError_t cudaGetDevice(int* d) {
    *d = current;
    return cudaSuccess;
}
API cudaError_t cudaSetDevice(int d) {
    if (d < 0 || d >= ndev()) return cudaErrorInvalidDevice;
    current = d;
    return cudaSuccess;
}
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int d) {
    memset(p, 0, sizeof *p);
    const char* e = getenv("MOCK_CUDA_SM");
    int sm = e ? atoi(e) : 86;
    strcpy(p->name, "Mock GPU");
    p->major = sm / 10;
    p->minor = sm % 10;
    p->multiProcessorCount = 82;
    p->totalGlobalMem = total();
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = 1536;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = 101376;
    p->sharedMemPerMultiprocessor = 102400;
    p->regsPerMultiprocessor = 65536;
    p->regsPerBlock = 65536;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->l2CacheSize = 6 << 20;
    p->textureAlignment = 512;
    p->memoryBusWidth = 384;
    p->concurrentKernels = 1;
    p->unifiedAddressing = 1;
    p->asyncEngineCount = 2;
    p->maxBlocksPerMultiProcessor = 16;
    return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) {
    static const std::map<int, int> known = {{1, 1024}, {8, 49152}, {10, 32}, {16, 82},    {39, 1536},
                                             {75, 8},   {76, 6},    {81, 102400}, {97, 101376}};
    auto it = known.find((int)a);
    *v = it == known.end() ? 1 : it->second;
    return cudaSuccess;
}
API cudaError_t cudaDeviceGetPCIBusId(char* s, int n, int d) {
    strncpy(s, "0000:01:00.0", n);
    return cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int* a, int* b) {
    *a = 0;
    *b = -5;
    return cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int* v, int, int) {
    *v = 0;
    return cudaSuccess;
}
API cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
API cudaError_t cudaDeviceSynchronize() { return mock_wait(nullptr, true); }
API cudaError_t cudaDriverGetVersion(int* v) {
    *v = 13000;
    return cudaSuccess;
}
API cudaError_t cudaRuntimeGetVersion(int* v) {
    *v = 13000;
    return cudaSuccess;
}
API cudaError_t cudaGetLastError() { return cudaSuccess; }
API cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
static std::atomic<long> handles{0x1000};
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) {
    *s = (cudaStream_t)(handles += 16);
    return cudaSuccess;
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) {
    *s = (cudaStream_t)(handles += 16);
    return cudaSuccess;
}
API cudaError_t cudaStreamCreate(cudaStream_t* s) {
    *s = (cudaStream_t)(handles += 16);
    return cudaSuccess;
}
API cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaStreamGetPriority(cudaStream_t, int* p) {
    *p = 0;
    return cudaSuccess;
}
API cudaError_t cudaStreamQuery(cudaStream_t stream) { return mock_wait(stream, false); }
API cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return mock_wait(stream, false); }
API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    mock_join(stream, event);
    return cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t* e) {
    *e = (cudaEvent_t)(handles += 16);
    return cudaSuccess;
}
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) {
    *e = (cudaEvent_t)(handles += 16);
    return cudaSuccess;
}
API cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    mock_record(event, stream);
    return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
    mock_record(event, stream);
    return cudaSuccess;
}
API cudaError_t cudaEventQuery(cudaEvent_t event) {
    cudaError_t error = mock_ask(event);
    return error ? error : mock_unsafe();
}
API cudaError_t cudaEventSynchronize(cudaEvent_t event) { return mock_ask(event); }
API cudaError_t cudaEventElapsedTime(float* t, cudaEvent_t, cudaEvent_t) {
    *t = 1;
    return cudaSuccess;
}
bool mock_take(void* address, size_t size, int device) {
    std::lock_guard<std::mutex> l(mu);
    contexts.insert(device);
    if (used[device] + size + context_bytes() > total()) return false;
    dev[(char*)address] = size;
    devidx[(char*)address] = device;
    used[device] += size;
    return true;
}
void mock_give(void* address) {
    std::lock_guard<std::mutex> l(mu);
    used[devidx[(char*)address]] -= dev[(char*)address];
    dev.erase((char*)address);
    devidx.erase((char*)address);
}
API cudaError_t cudaMalloc(void** p, size_t n) {
    *p = nullptr;
    if (cudaError_t error = mock_unsafe()) return error;
    void* q = mmap(nullptr, n ? n : 1, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (q == MAP_FAILED) return cudaErrorMemoryAllocation;
    if (!mock_take(q, n, current)) {
        munmap(q, n ? n : 1);
        return cudaErrorMemoryAllocation;
    }
    *p = q;
    return cudaSuccess;
}
API cudaError_t cudaFree(void* p) {
    if (!p) return cudaSuccess;
    if (cudaError_t error = mock_unsafe()) return error;
    size_t size;
    {
        std::lock_guard<std::mutex> l(mu);
        auto it = dev.find((char*)p);
        if (it == dev.end()) return cudaErrorInvalidValue;
        size = it->second;
    }
    mock_give(p);
    munmap(p, size ? size : 1);
    return cudaSuccess;
}
API cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) {
    if (cudaError_t error = mock_unsafe()) return error;
    if (posix_memalign(p, 4096, n ? n : 1)) return cudaErrorMemoryAllocation;
    std::lock_guard<std::mutex> l(mu);
    host[(char*)*p] = n;
    return cudaSuccess;
}
API cudaError_t cudaFreeHost(void* p) {
    {
        std::lock_guard<std::mutex> l(mu);
        host.erase((char*)p);
    }
    free(p);
    return cudaSuccess;
}
API cudaError_t cudaHostRegister(void*, size_t, unsigned) { return cudaSuccess; }
API cudaError_t cudaHostUnregister(void*) { return cudaSuccess; }
API cudaError_t cudaMemGetInfo(size_t* f, size_t* t) {
    *t = total();
    *f = total() - used[current] - context_bytes();
    return cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
    memset(a, 0, sizeof *a);
    a->type = cudaMemoryTypeUnregistered;
    a->device = current;
    if (on_device(p)) {
        a->type = cudaMemoryTypeDevice;
        a->devicePointer = (void*)p;
    } else if (inside(host, p)) {
        a->type = cudaMemoryTypeHost;
        a->hostPointer = (void*)p;
        a->devicePointer = (void*)p;
    }
    return cudaSuccess;
}
static cudaError_t copy(void* d, const void* s, size_t n) {
    if (on_device(d)) return cudaSuccess;
    if (!on_device(s)) {
        memcpy(d, s, n);
        return cudaSuccess;
    }
    memset(d, 0, n);
    if (getenv("MOCK_CUDA_FILL")) {  // ones: 8-byte integers, one float32, or booleans
        float one = 1;
        if (n % 8 == 0)
            for (size_t i = 0; i < n; i += 8) *(long long*)((char*)d + i) = 1;
        else if (n == 4)
            memcpy(d, &one, n);
        else
            memset(d, 1, n);
    }
    return cudaSuccess;
}
API cudaError_t cudaMemcpy(void* d, const void* s, size_t n, cudaMemcpyKind) {
    cudaError_t error = mock_unsafe();
    return error ? error : copy(d, s, n);
}
API cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind, cudaStream_t stream) {
    return mock_captured(stream, false) ? cudaSuccess : copy(d, s, n);
}
API cudaError_t cudaMemcpyPeerAsync(void* d, int, const void* s, int, size_t n, cudaStream_t) { return copy(d, s, n); }
API cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }
API cudaError_t cudaMemset(void*, int, size_t) { return cudaSuccess; }
API cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t stream) {
    mock_captured(stream, false);
    return cudaSuccess;
}
void mock_launch(cudaStream_t stream) {
    if (!mock_captured(stream, true)) launches++;
}
API cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t stream) {
    mock_launch(stream);
    return cudaSuccess;
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
    mock_launch(config->stream);
    return cudaSuccess;
}
API cudaError_t __cudaGetKernel(cudaKernel_t* k, const void* f) {
    *k = (cudaKernel_t)f;
    return cudaSuccess;
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t stream) {
    mock_launch(stream);
    return cudaSuccess;
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
    memset(a, 0, sizeof *a);
    a->binaryVersion = a->ptxVersion = 86;
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 32;
    a->maxDynamicSharedSizeBytes = 49152;
    return cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) {
    *n = 2;
    return cudaSuccess;
}
API cudaError_t cudaGetSymbolAddress(void** p, const void*) {
    *p = (void*)0x1000;
    return cudaSuccess;
}
static long stub_driver(...) { return 0; }
API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** f, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult* r) {
    *f = mock_driver(name);
    if (!*f) *f = (void*)stub_driver;
    if (r) *r = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
API cudaError_t cudaProfilerStart() { return cudaSuccess; }
API cudaError_t cudaProfilerStop() { return cudaSuccess; }
API void mock_gemm(cudaStream_t stream) { mock_launch(stream); }
