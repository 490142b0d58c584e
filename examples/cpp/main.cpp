// Ground a sentence in the clip features of a video with drn.moments.onnx, in ONNX Runtime.
//
//   ground drn.moments.onnx drn.words.txt features.npy DURATION "a sentence" [NUM_FRAMES]
//
// Prints one line per moment, best first: start and end in seconds, and score. README.md lists the differences from
// `drn infer`.

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <fstream>
#include <iostream>
#include <map>
#include <regex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include <onnxruntime_cxx_api.h>

using Metadata = std::map<std::string, std::string>;
using Words = std::unordered_map<std::string, int32_t>;

struct Features {
    size_t num_clips = 0, dim = 0;
    std::vector<float> values;  // (num_clips, dim)
};

struct Segments {
    std::vector<float> features;  // (T, D): maximum of the clips of each segment
    std::vector<float> spans;     // (T, 2): start and end as fractions of the video
};

Features read_npy(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    char magic[8];
    if (!file.read(magic, 8) || std::memcmp(magic, "\x93NUMPY", 6) != 0)
        throw std::runtime_error(path + " is not a .npy file.");
    unsigned char size[4] = {0, 0, 0, 0};
    file.read(reinterpret_cast<char*>(size), magic[6] == 1 ? 2 : 4);
    // NumPy's headers of such arrays are 118 bytes long; std::regex recurses for each character.
    std::string header(size[0] | size[1] << 8 | size[2] << 16, '\0');
    if (header.size() > 1000 || !file.read(header.data(), static_cast<std::streamsize>(header.size())))
        throw std::runtime_error(path + " has no header of NumPy.");
    std::smatch shape;
    if (header.find("'<f4'") == std::string::npos || header.find("'fortran_order': False") == std::string::npos ||
        !std::regex_search(header, shape, std::regex("'shape': \\((\\d{1,9}), (\\d{1,9})\\)")))
        throw std::runtime_error("Expected float32 of shape (clips, D) in " + path + ", got " +
                                 header.substr(0, header.find('}') + 1) +
                                 ". Save it with numpy.save(path, features.astype(numpy.float32)).");
    Features features;
    features.num_clips = std::stoul(shape[1]);
    features.dim = std::stoul(shape[2]);
    const auto start = file.tellg();
    const auto bytes = static_cast<std::streamsize>(features.num_clips * features.dim * sizeof(float));
    if (bytes == 0 || file.seekg(0, std::ios::end).tellg() - start < bytes)
        throw std::runtime_error(path + " is empty or truncated.");
    features.values.resize(features.num_clips * features.dim);
    file.seekg(start).read(reinterpret_cast<char*>(features.values.data()), bytes);
    // The maximum of a segment would hide NaN.
    if (!std::all_of(features.values.begin(), features.values.end(), [](float value) { return std::isfinite(value); }))
        throw std::runtime_error(path + " has values that are not finite.");
    return features;
}

// The id of a word is its line number, from 1. Models of older versions do not record the number of words.
Words read_words(const std::string& path, const Metadata& about) {
    std::ifstream file(path);
    Words words;
    for (std::string word; std::getline(file, word);) {
        if (!word.empty() && word.back() == '\r') word.pop_back();
        words.emplace(word, static_cast<int32_t>(words.size() + 1));
    }
    if (words.empty()) throw std::runtime_error(path + " is missing or empty.");
    if (about.count("num_words") && words.size() != std::stoul(about.at("num_words")))
        throw std::runtime_error("Expected the " + about.at("num_words") + " words of the model in " + path + ", got " +
                                 std::to_string(words.size()) + ". Give the drn.words.txt of the same export.");
    return words;
}

// Split a sentence as drn-deploy does: without full stops, with "'s" and commas as tokens. Characters and contractions
// that need more of the Treebank rules are rejected.
std::vector<std::string> tokenize(const std::string& sentence) {
    static const std::vector<std::string> contractions = {"cannot", "gimme", "gonna", "gotta", "lemme", "wanna"};
    std::string text;
    for (char character : sentence)
        if (character != '.') text += character;
    std::string spaced;
    for (size_t i = 0; i < text.size(); ++i) {
        const auto character = static_cast<unsigned char>(text[i]);
        const char next = i + 1 < text.size() ? text[i + 1] : ' ';
        const char after = i + 2 < text.size() ? text[i + 2] : ' ';
        const bool is_digit_next = std::isdigit(static_cast<unsigned char>(next)) != 0;
        const bool is_after_word = i > 0 && std::isalnum(static_cast<unsigned char>(text[i - 1])) != 0;
        const bool is_possessive = character == '\'' && is_after_word && (next == 's' || next == 'S') &&
                                   (after == ' ' || after == ',');
        if ((character < 128 && std::isalnum(character)) || character == ' ')
            spaced += text[i];
        else if (character == ',' && !is_digit_next && next != ',')
            spaced += " , ";
        else if (is_possessive)
            spaced += " '";
        else
            throw std::runtime_error("This program does not split '" + text.substr(i, 1) + "' in \"" + sentence +
                                     "\". Write the sentence without it.");
    }
    std::vector<std::string> tokens;
    std::istringstream stream(spaced);
    for (std::string token; stream >> token;) tokens.push_back(token);
    for (std::string token : tokens) {
        std::transform(token.begin(), token.end(), token.begin(), [](unsigned char c) { return std::tolower(c); });
        if (std::find(contractions.begin(), contractions.end(), token) != contractions.end())
            throw std::runtime_error("This program does not split \"" + token + "\". Write it as two words.");
    }
    return tokens;
}

// A word is looked up as written, then in lower case.
std::vector<int32_t> encode(const std::string& sentence, const Words& words, const Metadata& about) {
    std::vector<int32_t> ids;
    bool is_any_known = false;
    for (const std::string& token : tokenize(sentence)) {
        std::string lower = token;
        std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char c) { return std::tolower(c); });
        auto entry = words.find(token);
        if (entry == words.end()) entry = words.find(lower);
        if (entry != words.end()) {
            ids.push_back(entry->second);
            is_any_known = true;
            continue;
        }
        const std::string& treatment = about.at("unknown_words");
        if (treatment == "error") throw std::runtime_error("The model does not know '" + token + "'.");
        if (treatment == "zero") ids.push_back(0);
        std::cerr << "The model does not know '" << token << "'.\n";
    }
    if (!is_any_known) throw std::runtime_error("The model knows no word of \"" + sentence + "\".");
    if (ids.size() > std::stoul(about.at("max_query_length"))) throw std::runtime_error("The sentence is too long.");
    return ids;
}

// Pool clips to T segments; see `segment_rows` of runtime/core/pooling.py.
Segments pool(const Features& clips, int64_t num_frames, int64_t num_segments, const Metadata& about) {
    const int64_t window = std::stoll(about.at("clip_window")), stride = std::stoll(about.at("clip_stride"));
    const bool counts_from_one = about.at("pooling") == "drn";
    const double step = static_cast<double>(num_frames - 1) / static_cast<double>(num_segments);
    std::vector<int64_t> borders;
    for (int64_t i = 0; i < num_segments; ++i)
        borders.push_back(static_cast<int64_t>(step * static_cast<double>(i) + (counts_from_one ? 1 : 0)));
    borders.push_back(counts_from_one ? num_frames : num_frames - 1);
    Segments segments;
    segments.features.resize(static_cast<size_t>(num_segments) * clips.dim);
    const auto end = static_cast<int64_t>(clips.num_clips) - 1;
    for (int64_t i = 0; i < num_segments; ++i) {
        const int64_t from = borders[i], to = borders[i + 1];
        int64_t first = from / stride, last = to / stride;
        if (counts_from_one) last = to - from <= window ? first : std::max(first, (to - 1) / stride);
        first = std::min(first, end);
        last = std::min(last, end);
        float* row = &segments.features[static_cast<size_t>(i) * clips.dim];
        std::copy_n(&clips.values[static_cast<size_t>(first) * clips.dim], clips.dim, row);
        for (int64_t clip = first + 1; clip <= last; ++clip)
            for (size_t d = 0; d < clips.dim; ++d)
                row[d] = std::max(row[d], clips.values[static_cast<size_t>(clip) * clips.dim + d]);
        for (int64_t border : {from, to})
            segments.spans.push_back(static_cast<float>(static_cast<double>(border) / static_cast<double>(num_frames)));
    }
    return segments;
}

double parse_number(const std::string& text) {
    size_t end = 0;
    double number = 0;
    try {
        number = std::stod(text, &end);
    } catch (const std::logic_error&) {
    }
    if (text.empty() || end != text.size() || !std::isfinite(number))
        throw std::runtime_error("Expected a number, got \"" + text + "\".");
    return number;
}

// The frame count as given, or estimated from the clips, up to one stride too low. The limits are those of
// runtime/core/video.py and of `ClipTiming.contradicts` in runtime/core/pooling.py.
int64_t count_frames(const std::string& given, size_t num_clips, double seconds, const Metadata& about) {
    const int64_t window = std::stoll(about.at("clip_window")), stride = std::stoll(about.at("clip_stride"));
    const auto clips = static_cast<int64_t>(num_clips);
    const double number = given.empty() ? static_cast<double>((clips - 1) * stride + window) : parse_number(given);
    if (!(number >= 2 && number <= 2147483647) || number != std::floor(number))
        throw std::runtime_error("Expected a whole number of 2 frames or more, got " + std::to_string(number) + ".");
    const auto num_frames = static_cast<int64_t>(number);
    const double rate = number / seconds;
    if (!(rate >= 1 && rate <= 240))
        throw std::runtime_error("Expected 1 to 240 frames per second, got " + std::to_string(rate) +
                                 ". Correct the duration in seconds or the frame count.");
    const int64_t expected = num_frames < window ? 1 : (num_frames - window) / stride + 1;
    const int64_t low = std::min(expected, clips), high = std::max(expected, clips);
    if (2 * high > 3 * low && high - low > 2)
        throw std::runtime_error("Expected about " + std::to_string(expected) + " clips for " +
                                 std::to_string(num_frames) + " frames, got " + std::to_string(clips) +
                                 ". Correct the frame count, or use features with the clip timing of the model.");
    return num_frames;
}

// Lines of a name and a value under the metadata key "drn.moments".
Metadata read_metadata(const Ort::Session& session) {
    Ort::AllocatorWithDefaultOptions allocator;
    const auto text = session.GetModelMetadata().LookupCustomMetadataMapAllocated("drn.moments", allocator);
    if (!text) throw std::runtime_error("The model has no moments. Export it with `drn export --moments`.");
    Metadata values;
    std::istringstream lines(text.get());
    for (std::string name, value; lines >> name >> value;) values[name] = value;
    return values;
}

template <typename T>
Ort::Value tensor(std::vector<T>& values, const std::vector<int64_t>& shape) {
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    return Ort::Value::CreateTensor<T>(memory, values.data(), values.size(), shape.data(), shape.size());
}

// ONNX Runtime does not check the type as which an output is read, and names no input of another type.
void require_float32(ONNXTensorElementDataType type, const std::string& name) {
    if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) return;
    const std::string actual =
        type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? "float16" : "ONNX data type " + std::to_string(type);
    throw std::runtime_error("Expected float32 for " + name + " of the model, got " + actual +
                             ". Give the file that `drn export --moments` wrote.");
}

void ground(const std::vector<std::string>& arguments) {
    Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "ground");
    Ort::Session session(env, arguments[0].c_str(), Ort::SessionOptions());
    const Metadata about = read_metadata(session);
    // Inputs have the order of `inputs` below: the third is (batch, T, D).
    const Ort::TypeInfo input = session.GetInputTypeInfo(2);
    require_float32(input.GetTensorTypeAndShapeInfo().GetElementType(), "segment_features");
    const auto shape = input.GetTensorTypeAndShapeInfo().GetShape();
    const int64_t num_segments = shape[1], dim = shape[2];

    std::vector<int32_t> tokens = encode(arguments[4], read_words(arguments[1], about), about);
    const Features clips = read_npy(arguments[2]);
    if (static_cast<int64_t>(clips.dim) != dim)
        throw std::runtime_error("Expected features of width " + std::to_string(dim) + " in " + arguments[2] + ", got " +
                                 std::to_string(clips.dim) + ".");
    const double seconds = parse_number(arguments[3]);
    if (!(seconds > 0)) throw std::runtime_error("Expected a duration above 0 seconds.");
    if (about.count("max_duration") && seconds > parse_number(about.at("max_duration")))
        throw std::runtime_error("Videos above " + about.at("max_duration") + " s need windows. Use `drn infer`.");
    const int64_t num_frames =
        count_frames(arguments.size() > 5 ? arguments[5] : "", clips.num_clips, seconds, about);
    Segments segments = pool(clips, num_frames, num_segments, about);
    std::vector<int32_t> length = {static_cast<int32_t>(tokens.size())};
    std::vector<float> duration = {static_cast<float>(seconds)};

    const char* inputs[] = {"query_tokens", "query_length", "segment_features", "segment_spans", "duration"};
    const char* outputs[] = {"moments", "moment_count"};
    std::vector<Ort::Value> values;
    values.push_back(tensor(tokens, {1, length[0]}));
    values.push_back(tensor(length, {1}));
    values.push_back(tensor(segments.features, {1, num_segments, dim}));
    values.push_back(tensor(segments.spans, {1, num_segments, 2}));
    values.push_back(tensor(duration, {1}));
    const auto results = session.Run(Ort::RunOptions(), inputs, values.data(), values.size(), outputs, 2);
    require_float32(results[0].GetTensorTypeAndShapeInfo().GetElementType(), outputs[0]);
    const float* moments = results[0].GetTensorData<float>();
    const int32_t count = results[1].GetTensorData<int32_t>()[0];
    if (count < 0) throw std::runtime_error("The network returned values that are not finite. Check the features.");
    if (count == 0) std::cerr << "No moment found: the best score is below the no-match threshold of the model.\n";
    for (int32_t i = 0; i < count; ++i)
        std::printf("%.6g %.6g %.6g\n", moments[3 * i], moments[3 * i + 1], moments[3 * i + 2]);
}

int main(int argc, char** argv) {
    const std::vector<std::string> arguments(argv + 1, argv + argc);
    if (arguments.size() < 5 || arguments.size() > 6) {
        std::cerr << "usage: ground MODEL.moments.onnx WORDS.txt FEATURES.npy DURATION \"SENTENCE\" [NUM_FRAMES]\n";
        return 2;
    }
    try {
        ground(arguments);
    } catch (const std::exception& error) {
        std::cerr << "error: " << error.what() << '\n';
        return 2;
    }
    return 0;
}
