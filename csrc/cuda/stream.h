#pragma once

namespace dgc {

// Returns torch's current stream of a device, a cudaStream_t.
void* current_stream(int device);

}  // namespace dgc
