// A reader of JSON that is as small as a trace file allows: objects, lists, strings without \u, and whole numbers.
#pragma once

#include <cctype>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace json {

struct Value {
    std::int64_t number = 0;
    std::string text;
    std::vector<Value> items;
    std::map<std::string, Value> members;

    const Value& operator[](const std::string& name) const {
        const auto found = members.find(name);
        if (found == members.end()) throw std::runtime_error("the trace has no key " + name);
        return found->second;
    }
    std::vector<std::int64_t> numbers() const {
        std::vector<std::int64_t> result;
        for (const Value& item : items) result.push_back(item.number);
        return result;
    }
};

class Reader {
public:
    explicit Reader(std::string text) : text_(std::move(text)) {}

    Value read() {
        Value value = read_value();
        if (peek() != '\0') fail("the end");
        return value;
    }

private:
    Value read_value() {
        Value value;
        const char first = peek();
        if (first == '{') {
            ++at_;
            for (bool more = peek() != '}' || take('}'); more; more = next_of('}')) {
                std::string name = read_string();
                expect(':');
                value.members[std::move(name)] = read_value();
            }
        } else if (first == '[') {
            ++at_;
            for (bool more = peek() != ']' || take(']'); more; more = next_of(']')) value.items.push_back(read_value());
        } else if (first == '"') {
            value.text = read_string();
        } else if (first == '-' || std::isdigit(static_cast<unsigned char>(first))) {
            std::size_t length = 0;
            value.number = std::stoll(text_.substr(at_, 24), &length);
            at_ += length;
        } else if (text_.compare(at_, 4, "null") == 0 || text_.compare(at_, 4, "true") == 0) {
            at_ += 4;
        } else if (text_.compare(at_, 5, "false") == 0) {
            at_ += 5;
        } else {
            fail("a value");
        }
        return value;
    }

    std::string read_string() {
        expect('"');
        std::string result;
        while (at_ < text_.size() && text_[at_] != '"') {
            if (text_[at_] == '\\') ++at_;
            if (at_ < text_.size()) result += text_[at_++];
        }
        expect('"');
        return result;
    }

    char peek() {  // the next character that is no space, '\0' at the end
        while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
        return at_ < text_.size() ? text_[at_] : '\0';
    }
    bool take(char) {  // an empty list or object: step over its end, and there is nothing more
        ++at_;
        return false;
    }
    bool next_of(char end) {  // after an item: whether another one follows
        const char found = peek();
        if (found != ',' && found != end) fail(std::string(1, ',') + " or " + end);
        ++at_;
        return found == ',';
    }
    void expect(char wanted) {
        if (peek() != wanted) fail(std::string(1, wanted));
        ++at_;
    }
    [[noreturn]] void fail(const std::string& wanted) const {
        throw std::runtime_error("malformed JSON at byte " + std::to_string(at_) + ": expected " + wanted);
    }

    std::string text_;
    std::size_t at_ = 0;
};

}  // namespace json
