// What runs a forward of a bundle's graph. docs/loop.md states every name.
#pragma once

#include <cstdint>
#include <vector>

namespace cllm {

using Token = std::int64_t;
using Tokens = std::vector<Token>;

struct Batch {                      // the inputs of one slot
    Tokens input_ids;               // n tokens; the first is known, and its KV is not stored yet
    std::int64_t num_committed = 1; // 1 in decoding, the length of the chunk in prefill
    std::int64_t write_index = 0;   // valid KV rows; the forward writes rows from here on
};

struct Forward {                    // the outputs of one slot
    Tokens next_ids;                // n tokens: the model's greedy token after each row
    std::int64_t num_accepted = 1;  // leading rows that are right, at least 1
};

class Engine {
public:
    virtual ~Engine() = default;
    virtual std::int64_t kv_rows() const = 0;       // rows of the KV cache
    virtual std::int64_t prefill_chunk() const = 0; // most tokens of the prompt in one forward
    virtual void prefill(const Batch& batch) = 0;   // outputs are not read
    virtual Forward decode(const Batch& batch) = 0;
};

// An engine over TensorRT or ONNX Runtime has the same two functions. This outline was NOT compiled against either.
//
//   TensorRT (plans/KEY/model.plan), for a block of n tokens at write index w:
//     once:  engine = runtime->deserializeCudaEngine(plan);  context = engine->createExecutionContext();
//            allocate the caches, zero them once, and set each past and its present to the same address
//     1. S = the smallest KV length of the plan that is at least w + n
//     2. copy input_ids, num_committed, write_index, kv_positions = 0 .. S - 1 and head_rows = 0 .. n - 1 to the device
//     3. context->setInputShape(name, dims) for each input; context->setTensorAddress(name, pointer) for each tensor
//     4. context->enqueueV3(stream), copy next_ids and num_accepted back, cudaStreamSynchronize(stream)
//
//   ONNX Runtime (graph.onnx):
//     once:  Ort::Session and Ort::IoBinding; BindInput(past) and BindOutput(present) to one Ort::Value for each cache
//     then:  BindInput for the five small tensors, session.Run(options, binding), read next_ids and num_accepted
//
//   Prefill is the same forward with num_committed = the length of the chunk and head_rows = {0}.

}  // namespace cllm
