// What the files of the mock ask each other.
#pragma once
#include <cuda_runtime_api.h>
#define API extern "C" __attribute__((visibility("default")))
void mock_launch(cudaStream_t stream);                 // a kernel: it runs at once, or becomes a node
bool mock_captured(cudaStream_t stream, bool kernel);  // whether the stream is captured; then that is a node
cudaError_t mock_unsafe();                             // the error of a call that a capture forbids
cudaError_t mock_wait(cudaStream_t stream, bool device);
void mock_record(cudaEvent_t event, cudaStream_t stream);
void mock_join(cudaStream_t stream, cudaEvent_t event);
cudaError_t mock_ask(cudaEvent_t event);
bool mock_take(void* address, size_t size, int device);  // device memory; false where it is full
void mock_give(void* address);
void* mock_driver(const char* name);  // of the functions that expandable segments call
