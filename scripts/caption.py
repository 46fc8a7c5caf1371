"""Caption a folder or a list of images into a file of JSON lines.

The checkpoint that the quickstart made, on a CPU:
    python scripts/caption.py --cfg-path eval_configs/mini_eval.yaml --images data/mini/flickr30k/flickr30k-images \
        --output output/mini/captions.jsonl
Another checkpoint and prompt, and 4 GPUs:
    torchrun --standalone --nproc-per-node 4 scripts/caption.py --cfg-path eval_configs/minigpt4_eval.yaml \
        --ckpt RUN/checkpoint_4.pth --images photos --output captions.jsonl --batch-size 32 \
        --prompt "<Img><ImageHere></Img> Describe this image in one sentence."
The same command resumes, and captions images that were added since. An image that cannot be read gets a line with its
error, and the exit status is then 1; --retry-failed tries it again.
"""

import argparse
import dataclasses
import logging
import sys
from pathlib import Path

from minigpt4.common.binding import require_paths
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError, MiniGPT4Error
from minigpt4.common.logger import setup_logging
from minigpt4.common.utils import quick_imports

log = logging.getLogger("caption")

FAILED_IMAGES, USER_ERROR, INTERRUPTED = 1, 2, 130


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg-path", required=True, help="YAML file with the model")
    parser.add_argument("--ckpt", metavar="FILE", help="checkpoint (model.ckpt of the YAML)")
    images = "folder, list (.txt, .json) or image files"
    parser.add_argument("--images", required=True, nargs="+", type=Path, metavar="PATH", help=images)
    parser.add_argument("--image-folder", type=Path, metavar="DIR", help="where the files of a list are (beside it)")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.jsonl", help="a line an image")
    parser.add_argument("--prompt", help="instruction with one <ImageHere> (run.generation.prompt of the YAML)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images at once (run.batch_size_eval, or 8)")
    parser.add_argument("--retry-failed", action="store_true", help="try again what could not be read")
    parser.add_argument("--options", nargs="*", metavar="KEY=VALUE", help="override config values")
    args = parser.parse_args(argv)
    if args.batch_size is not None and args.batch_size < 1:
        parser.error("--batch-size must be at least 1")
    return args


def read_configuration(args: argparse.Namespace) -> Config:
    """The config with the checkpoint, or the file of a whole LLaVA; ConfigError if there is none."""
    config = Config(args).validate(training=False)
    if args.ckpt is not None:
        config = config.replace(model=dataclasses.replace(config.model, ckpt=args.ckpt))
    require_paths({"model": config.model}, config.source)
    if not config.model.ckpt:
        from minigpt4.models.llava_weights import whole_file

        config = config.replace(model=dataclasses.replace(config.model, ckpt=str(whole_file(config.model) or "")))
    if not config.model.ckpt:
        raise ConfigError(f"--ckpt: is missing, and {config.source} has no model.ckpt")
    return config


def caption(args: argparse.Namespace) -> int:
    """Cheap checks first, then caption; returns the exit status."""
    config = read_configuration(args)
    with quick_imports():
        from minigpt4.common.dist_utils import start_processes, stop_processes
        from minigpt4.inference.captioning import AnswerStore, caption_images
        from minigpt4.inference.image_list import images_to_caption
        from minigpt4.inference.pipeline import BATCH_SIZE, PromptRules

    file = AnswerStore.captions(args.output)
    base, items = images_to_caption(args.images, args.image_folder)
    rules = PromptRules.of(config, args.prompt, source="--prompt")
    processes = start_processes(config.run.device, config.run.distributed, config.run.dist_url)
    setup_logging(processes.rank)
    log.info("%d images; prompt %r; stop %s; %s", len(items), rules.prompt, rules.stop, rules.decoding)
    size = args.batch_size or config.run.batch_size_eval or BATCH_SIZE
    counts = caption_images(config, rules, base, items, size, file, processes, retry_failed=args.retry_failed)
    stop_processes()
    if counts is None:
        return 0
    captioned, failed, new = counts
    print(f"{captioned} captions, {failed} failed ({new} new): {args.output}")
    if not failed:
        return 0
    log.warning("%d images have no caption; their lines say why, and --retry-failed tries them again", failed)
    return FAILED_IMAGES


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 1 where images failed; 2 for an error that the user can fix; 130 after Ctrl-C."""
    args = parse_args(argv)
    setup_logging(rank=0)
    try:
        return caption(args)
    except MiniGPT4Error as error:
        sys.stderr.write(f"error: {error}\n")
        return USER_ERROR
    except KeyboardInterrupt:
        sys.stderr.write(f"stopped; the same command resumes: {args.output}\n")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
