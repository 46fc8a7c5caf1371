#!/usr/bin/env bash
# Fetch the images of stage 1 with img2dataset into tar shards, NNNNN.tar with .jpg, .json and .txt per pair.
#   pip install img2dataset
#   scripts/download_stage1_images.sh ccs_synthetic_filtered_large.tsv cc_sbu_dataset      # shards 00000..01255
#   scripts/download_stage1_images.sh laion_synthetic_filtered_large.tsv laion_dataset     # shards 00000..10488
# Both together take about 2.3 TB. Many links are dead by now: fewer images, and so fewer pairs per shard, are normal.
# The same command resumes. More arguments go to img2dataset as they are.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: $0 FILE.tsv OUTPUT_FOLDER [img2dataset arguments]" >&2
    exit 2
fi
if ! command -v img2dataset >/dev/null; then
    echo "error: img2dataset is not installed; pip install img2dataset" >&2
    exit 2
fi
table=$1
folder=$2
shift 2

# 224 pixels and 10,000 pairs a shard as published, hence the numbers of the shards in the default configuration.
exec img2dataset --url_list "$table" --input_format tsv --url_col url --caption_col caption \
    --output_format webdataset --output_folder "$folder" --number_sample_per_shard 10000 --image_size 224 \
    --processes_count 16 --thread_count 128 --enable_wandb False --incremental_mode incremental "$@"
