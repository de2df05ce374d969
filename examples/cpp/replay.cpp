// Replay the traces of `cllm-export trace`: the loop must give every recorded input and token. It needs no model.
//
//     g++ -std=c++17 -O2 -o replay replay.cpp && ./replay traces.json
//
// It exits with 0 if all is equal, and with 1 and the first difference if not.

#include <cstdlib>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>

#include "decode.hpp"
#include "json.hpp"

namespace {

std::string text_of(const cllm::Tokens& tokens) {
    std::string text;
    for (const cllm::Token token : tokens) text += " " + std::to_string(token);
    return "[" + text + " ]";
}

void require(bool equal, const std::string& what, const std::string& wanted, const std::string& found) {
    if (!equal) throw std::runtime_error(what + ": the trace has " + wanted + ", the loop " + found);
}

void require_equal(std::int64_t wanted, std::int64_t found, const std::string& what) {
    require(wanted == found, what, std::to_string(wanted), std::to_string(found));
}

// An engine that holds each input against the recorded one, and gives the recorded outputs.
class ReplayEngine : public cllm::Engine {
public:
    ReplayEngine(const json::Value& file, const json::Value& trace) : file_(file), forwards_(trace["forwards"].items) {}

    std::int64_t kv_rows() const override { return file_["geometry"]["cache_length"].number; }
    std::int64_t prefill_chunk() const override { return file_["prefill_chunk"].number; }
    void prefill(const cllm::Batch& batch) override { take("prefill", batch); }

    cllm::Forward decode(const cllm::Batch& batch) override {
        const json::Value& forward = take("decode", batch);
        cllm::Forward outputs{forward["next_ids"].numbers(), forward["num_accepted"].number};
        require_equal(outputs.num_accepted, cllm::count_accepted(batch.input_ids, outputs.next_ids), "num_accepted");
        return outputs;
    }

    std::size_t num_taken() const { return taken_; }
    std::size_t num_forwards() const { return forwards_.size(); }

private:
    const json::Value& take(const std::string& kind, const cllm::Batch& batch) {
        if (taken_ == forwards_.size()) throw std::runtime_error("the loop runs more forwards than the trace");
        const json::Value& forward = forwards_[taken_++];
        const std::string where = "forward " + std::to_string(taken_) + ", ";
        require(forward["kind"].text == kind, where + "kind", forward["kind"].text, kind);
        const cllm::Tokens wanted = forward["input_ids"].numbers();
        require(wanted == batch.input_ids, where + "input_ids", text_of(wanted), text_of(batch.input_ids));
        require_equal(forward["num_committed"].number, batch.num_committed, where + "num_committed");
        require_equal(forward["write_index"].number, batch.write_index, where + "write_index");
        return forward;
    }

    const json::Value& file_;
    const std::vector<json::Value>& forwards_;
    std::size_t taken_ = 0;
};

cllm::Request request_of(const json::Value& file, const json::Value& trace) {
    cllm::Request request;
    request.prompt_ids = trace["prompt_ids"].numbers();
    request.block_size = trace["block_size"].number;
    request.max_new_tokens = trace["max_new_tokens"].number;
    request.eos_token_ids = file["eos_token_ids"].numbers();
    request.pad_token_id = file["pad_token_id"].number;
    const std::string& method = trace["method"].text;
    if (method == "autoregressive")
        request.method = cllm::Method::autoregressive;
    else if (method == "jacobi")
        request.method = cllm::Method::jacobi;
    else if (method == "jacobi-block")
        request.method = cllm::Method::jacobi_block;
    else
        throw std::runtime_error("unknown method " + method);
    const std::string& proposer = trace["proposer"].text;
    if (proposer != "pad" && proposer != "repeat") throw std::runtime_error("unknown proposer " + proposer);
    request.proposer = proposer == "pad" ? cllm::Proposer::pad : cllm::Proposer::repeat;
    return request;
}

std::size_t replay(const json::Value& file, const json::Value& trace) {
    const cllm::Request request = request_of(file, trace);
    ReplayEngine engine(file, trace);
    const cllm::Generation generation = cllm::Loop(engine, request).run();
    const cllm::Tokens wanted = trace["token_ids"].numbers();
    require(wanted == generation.token_ids, "token_ids", text_of(wanted), text_of(generation.token_ids));
    const std::string& reason = trace["finish_reason"].text;
    require(reason == generation.finish_reason, "finish_reason", reason, generation.finish_reason);
    require(engine.num_taken() == engine.num_forwards(), "forwards", std::to_string(engine.num_forwards()),
            std::to_string(engine.num_taken()));
    return engine.num_taken();
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) {
        std::cerr << "usage: replay TRACES.json\n";
        return 2;
    }
    std::ifstream stream(argv[1]);
    if (!stream) {
        std::cerr << "error: cannot read " << argv[1] << "\n";
        return 2;
    }
    const std::string text((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
    std::string where;
    try {
        const json::Value file = json::Reader(text).read();
        require_equal(file["trace_version"].number, 1, "trace_version");
        std::size_t num_forwards = 0;
        for (const json::Value& trace : file["traces"].items) {
            where = "prompt " + trace["prompt"].text + ", " + trace["method"].text + ", ";
            num_forwards += replay(file, trace);
        }
        std::cout << file["traces"].items.size() << " traces and " << num_forwards << " forwards are equal\n";
    } catch (const std::exception& error) {
        std::cerr << "error: " << where << error.what() << "\n";
        return 1;
    }
    return 0;
}
