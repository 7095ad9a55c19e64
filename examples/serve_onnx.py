"""A server that classifies images with an exported network: onnxruntime, numpy and Pillow, without PyTorch.

    delta-export RUN --format onnx --output bird.onnx
    python examples/serve_onnx.py bird.onnx --port 8000
    curl --data-binary @photo.jpg http://localhost:8000       # [{"class": "ant", "probability": 0.97}, ...]

Images go through the steps in the MODEL_CARD.md beside the file, whose numbers are also in the file.
"""

import argparse
import io
import json
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


class Classifier:
    """Class names and probabilities for the bytes of an image file, the most probable first."""

    def __init__(self, path: str):
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.card = json.loads(self.session.get_modelmeta().custom_metadata_map["model_card"])
        if self.card["measured"]["crops"] != 1 or self.card["preprocessing"].get("test_image") == "whole":
            raise SystemExit("This example takes only the centre crop: see MODEL_CARD.md for the steps of this file.")

    def __call__(self, content: bytes) -> list[dict]:
        steps = self.card["preprocessing"]
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        size, side = steps["resize"], steps["center_crop"]
        kept = tuple(size * length // min(image.size) for length in image.size)
        resampling = Image.Resampling[steps["interpolation"].partition(",")[0].upper()]
        image = image.resize(kept if steps["aspect"] == "keep" else (size, size), resampling)
        left, top = round((image.width - side) / 2), round((image.height - side) / 2)
        crop = image.crop((left, top, left + side, top + side))
        images = np.asarray(crop, np.float32).transpose(2, 0, 1)[None] / 255  # mean and deviation are in the file
        (logits,) = self.session.run(["logits"], {"images": images})
        powers = np.exp(logits[0] - logits[0].max())
        best = sorted(zip(self.card["classes"], powers / powers.sum(), strict=True), key=lambda pair: -pair[1])
        return [{"class": name, "probability": round(float(value), 6)} for name, value in best]


def handler(classify: Classifier) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            content = self.rfile.read(int(self.headers["Content-Length"] or 0))
            try:
                status, answer = 200, classify(content)
            except OSError:
                status, answer = 400, {"error": "this is no image that Pillow can read"}
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

    return Handler


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="file of delta-export --format onnx")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    HTTPServer(("127.0.0.1", arguments.port), handler(Classifier(arguments.model))).serve_forever()
