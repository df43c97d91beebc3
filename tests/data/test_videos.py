"""Rows with videos: lists of frames, in every container, and the commands that take them."""

from __future__ import annotations

import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pools import add_member, png

from vfl_train.config import DataConfig, EvalConfig, LoraConfig, SelectConfig
from vfl_train.data import check as data_check
from vfl_train.data import videos as videos_module
from vfl_train.data.collator import Collator
from vfl_train.data.images import open_image
from vfl_train.data.overlong import judge_rows
from vfl_train.data.parse import parse_row
from vfl_train.data.pool import iterate, open_pool
from vfl_train.data.rows import Image as ImagePart
from vfl_train.data.rows import Reason, Row, RowError, Text, Video
from vfl_train.data.videos import open_row
from vfl_train.errors import ConfigError
from vfl_train.phantom import world
from vfl_train.phantom.architecture import LAYERS, WIDTH
from vfl_train.schemas import FunctionProfile, ModelInfo, Profile
from vfl_train.training.prefix_store import row_key

FRAMES = ["clip/1.png", "clip/2.png", "clip/3.png"]
QUESTION = {"type": "text", "text": "how many?"}


def talk(text: str, **keys: object) -> dict:
    """One question and its answer, as LLaMA-Factory and LLaVA write them."""
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "three"}]
    return {"conversations": turns, **keys}


def chat(content: object, **keys: object) -> dict:
    """The same as ms-swift and qwen-vl-utils write them."""
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "three"}]
    return {"messages": turns, **keys}


@pytest.fixture
def root(image_root):
    """`image_root` with a clip of three frames, each of another colour."""
    (image_root / "clip").mkdir()
    for name, color in zip(FRAMES, ("red", "lime", "blue"), strict=True):
        Image.new("RGB", (16, 16), color).save(image_root / name)
    return image_root


def colours(row: Row) -> list[list[tuple[int, ...]]]:
    return [[open_image(ref).getpixel((0, 0)) for ref in frames] for frames in row.videos]


RED, LIME, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


# --- parsing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        talk("<video>\nhow many?", videos=[FRAMES]),
        talk("<video>\nhow many?", video=FRAMES),
        chat("<video>\nhow many?", videos=[FRAMES]),
        chat([{"type": "video"}, {"type": "text", "text": "how many?"}], videos=[FRAMES]),
        chat([{"type": "video", "video": FRAMES}, {"type": "text", "text": "how many?"}]),
    ],
    ids=["videos", "video", "chat", "part", "named"],
)
def test_the_ways_to_write_a_video(value):
    row = parse_row(value)
    assert row.messages[0].content == (Video(0), Text("how many?"))
    assert row.videos == (tuple(FRAMES),) and row.images == ()


def test_images_and_videos_are_counted_apart():
    row = parse_row(talk("<video><image>a<video>", videos=[FRAMES, FRAMES[:1]], images=["a.png"]))
    assert row.messages[0].content == (Video(0), ImagePart(0), Text("a"), Video(1))
    mixed = [{"type": "video"}, {"type": "image", "image": "b.png"}, {"type": "video", "video": FRAMES[:2]}]
    row = parse_row(chat([*mixed, {"type": "image"}], videos=[FRAMES], images=["a.png"]))
    assert row.messages[0].content == (Video(0), ImagePart(0), Video(1), ImagePart(1))
    assert (row.videos, row.images) == ((tuple(FRAMES), tuple(FRAMES[:2])), ("b.png", "a.png"))


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (talk("<video>q", videos=["a.mp4"]), Reason.video_file),
        (talk("<image>q", video="a.mp4"), Reason.video_file),
        (talk("<video>q", videos=FRAMES), Reason.video_file),
        (talk("<video>q", videos="a.mp4"), Reason.video_file),
        (talk("<video>q", videos=[{"bytes": None, "path": "a.mp4"}]), Reason.video_file),
        (chat([{"type": "video", "video": "file:///a.mp4"}]), Reason.video_file),
        (talk("<video>q", videos=[[]]), Reason.video_frames),
        (chat([{"type": "video", "video": []}]), Reason.video_frames),
        (talk("<video>q", videos=[["a.png"] * 400] * 2), Reason.video_count_mismatch),
        (talk("<video><video>q", videos=[["a.png"] * 400] * 2), Reason.video_frames),
        (talk("<video>q"), Reason.video_count_mismatch),
        (talk("q", videos=[FRAMES]), Reason.video_count_mismatch),
        (chat([{"type": "video"}]), Reason.video_count_mismatch),
        (talk("<video>q", videos=[FRAMES], video=FRAMES), Reason.ambiguous_keys),
        (talk("<video>q", videos=[[7]]), Reason.wrong_type),
        (talk("<video>q", videos=7), Reason.wrong_type),
        (talk("<video>q", videos=[["\udfff.png"]]), Reason.bad_utf8),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "<video>a"}],
          "videos": [FRAMES]}, Reason.image_in_answer),
    ],
)  # fmt: skip
def test_rows_that_are_refused(value, code):
    with pytest.raises(RowError) as caught:
        parse_row(value)
    assert caught.value.code == code
    assert caught.value.detail.isprintable()


def test_a_video_file_is_refused_in_one_sentence_that_says_what_to_do():
    with pytest.raises(RowError) as caught:
        parse_row(talk("<video>q", videos=["clips/a.mp4"]))
    assert caught.value.detail == (
        "clips/a.mp4 is one file where a video's list of frames should be: "
        "cut it (ffmpeg -i clip.mp4 -vf fps=2 clip/%04d.jpg) and list the frames"
    )


# --- frames as files -------------------------------------------------------------------------------


def test_frames_lie_under_the_image_root_and_are_opened_as_images(root, write_jsonl, audit):
    (root / "clip.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    Image.new("RGB", (24, 16)).save(root / "wide.png")
    (root / "broken.png").write_bytes((root / FRAMES[0]).read_bytes()[:40])
    rows = [
        talk("<video>q", videos=[FRAMES]),
        talk("<video>q", videos=[["../data.jsonl"]]),
        talk("<video>q", videos=[["https://example.com/a.png"]]),
        talk("<video>q", videos=[[FRAMES[0], "no.png"]]),
        talk("<video>q", videos=[[FRAMES[0], "clip.mp4"]]),
        talk("<video>q", videos=[[FRAMES[0], "wide.png"]]),
        talk("<video>q", videos=[[FRAMES[0], "broken.png"]]),
    ]
    with audit.record("socket.connect", "socket.getaddrinfo") as events:
        first, *others = iterate(write_jsonl(rows), root, check_images=True)
    assert not events
    assert isinstance(first, Row) and colours(first) == [[RED, LIME, BLUE]]
    assert [str(entry.code) for entry in others] == [
        "image_outside_root", "remote_image", "image_missing", "image_format", "video_frames",
        "image_unreadable",
    ]  # fmt: skip
    assert others[4].detail == "frames of one video differ in size (16 x 16 and 24 x 16)"


def test_frames_are_counted_in_pixels_before_one_is_decoded(root, write_jsonl, monkeypatch):
    (row,) = iterate(write_jsonl([talk("<video>q", videos=[FRAMES])]), root)
    monkeypatch.setattr(videos_module, "MAX_FRAME_PIXELS", 3 * 16 * 16 - 1)
    monkeypatch.setattr(videos_module, "open_image", pytest.fail)
    with pytest.raises(RowError, match="more than 767 pixels") as caught:
        open_row(row)
    assert caught.value.code == Reason.video_frames


def test_other_frames_are_another_row(root, write_jsonl):
    """To scores and to the prefix cache: other frames, another order, the same ones cut elsewhere."""
    cuts = [[FRAMES[:1], FRAMES[1:]], [FRAMES[:2], FRAMES[2:]]]
    listed = [[FRAMES], [FRAMES[:2]], [[FRAMES[1], FRAMES[0]]], *cuts]
    rows = [chat([*({"type": "video", "video": v} for v in videos), QUESTION]) for videos in listed]
    rows.append(chat([{"type": "video"}, {"type": "video"}, QUESTION], videos=cuts[1]))
    found = list(iterate(write_jsonl(rows), root))
    assert len({row.uid for row in found}) == len(rows)
    keys = [row_key(row) for row in found]
    assert len(set(keys[:5])) == 5 and keys[5] == keys[4]


def test_parquet_holds_lists_of_paths_and_no_videos(root, tmp_path):
    value = {**chat("<video>q", videos=[FRAMES, FRAMES[:1]]), "id": "r0"}
    value["messages"][0]["content"] = "<video><video>q"
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([value]), path)
    (row,) = iterate(path, root)
    assert colours(row) == [[RED, LIME, BLUE], [RED]]
    for column in ([b"mp4"], [{"bytes": b"mp4", "path": "a.mp4"}], [[[b"png"]]]):
        pq.write_table(pa.table({"messages": [value["messages"]], "videos": [column]}), path)
        with pytest.raises(ConfigError, match=r"the column videos of .* holds bytes, which are not decoded"):
            open_pool(path, root)


def test_a_tar_holds_frames_as_members(tmp_path):
    def sample(tar, key, value, members):
        add_member(tar, f"{key}.json", json.dumps(value).encode())
        for name, colour in members:
            add_member(tar, f"{key}.{name}", png(colour))

    path = tmp_path / "pool.tar"
    frames = [("f1.png", "red"), ("f2.png", "lime"), ("i.png", "blue")]
    with tarfile.open(path, "w") as tar:
        sample(tar, "a", chat("<video><image>q", videos=[["f1.png", "f2.png"]], images=["i.png"]), frames)
        sample(tar, "b", chat("<video>q", video=["f2.png", "f1.png"]), frames)
        sample(tar, "c", chat("<video>q", videos=[["f1.png", "gone.png"]]), frames)
        sample(tar, "d", chat("<video>q", videos=["clip.mp4"]), frames)
    a, b, c, d = iterate(path)
    assert colours(a) == [[RED, LIME]] and open_image(a.images[0]).getpixel((0, 0)) == BLUE
    assert colours(b) == [[LIME, RED]] and not b.images
    assert (c.code, d.code) == (Reason.image_missing, Reason.video_file)


# --- commands --------------------------------------------------------------------------------------


def test_check_and_preview_show_videos(root, write_jsonl, encoders, monkeypatch, capsys):
    row = talk("<video><image>how many?", videos=[FRAMES], image="a.png")
    other = {**row, "videos": [FRAMES[::-1]]}
    rows = [row, talk("<video>q", video="a.mp4"), row, talk("<image>q", image="a.png"), other]
    path = str(write_jsonl(rows))
    survey = data_check.check(DataConfig(action="check", data=path, image_root=root))
    printed = capsys.readouterr().out
    assert "5 read = 4 kept + 1 quarantined" in printed and "videos: 3" in printed
    assert "ffmpeg -i clip.mp4" in printed
    assert survey.findings()["duplicate_row"].rows == [2]
    monkeypatch.setattr(data_check, "_collator", lambda config: Collator(encoders["qwen"]))
    data_check.preview(DataConfig(action="preview", data=path, image_root=root, model="any", limit=1))
    printed = capsys.readouterr().out
    assert "clip/1.png and on, 3 frames: 16 x 16 pixels, 8 tokens" in printed
    assert "a.png: 16 x 16 pixels, 4 tokens" in printed
    assert f"{data_check.OPEN}three<|im_end|>{data_check.CLOSE}" in printed


def test_rows_with_videos_are_never_shrunk(root, write_jsonl, encoders):
    (row,) = iterate(write_jsonl([talk("<video>how many?", videos=[FRAMES])]), root)
    length = encoders["qwen"].encode(row.messages, *open_row(row)).length
    assert judge_rows([row], encoders["qwen"], length, "shrink-image") == [None]
    (verdict,) = judge_rows([row], encoders["qwen"], length - 1, "shrink-image")
    why = f"{length} tokens, --max-length is {length - 1}, and frames of videos are not shrunk"
    assert verdict == ("too_long", why)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """12 rows about scenes, in turn as a video of the scene twice and as an image."""
    folder, rng, lines = tmp_path_factory.mktemp("videos"), np.random.default_rng(0), []
    for i in range(12):
        scene, function = world.sample_scene(rng), ("ocr", "emotion")[i // 2 % 2]
        world.render(scene).save(folder / f"{i}.png")
        row = {"id": f"r{i}", "source": function}
        filmed = i % 2 == 0
        shown = {"videos": [[f"{i}.png"] * 2]} if filmed else {"images": [f"{i}.png"]}
        marker = "<video>" if filmed else "<image>"
        turns = [
            {"role": "user", "content": f"{marker}\n{world.QUESTIONS[function]}"},
            {"role": "assistant", "content": world.answer(scene, function)},
        ]
        lines.append(json.dumps({**row, **shown, "messages": turns}))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_select_scores_videos_as_images_on_both_paths(pool):
    """Engine and reference agree, and what is taken away matters, also where grey frames take its place."""
    from vfl_train.data_select.scoring import Scorer
    from vfl_train.models import VisionLanguageModel

    vlm = VisionLanguageModel.load("phantom", device="cpu")
    rows = [row for row in iterate(pool) if isinstance(row, Row)][:4]
    for ablation in ("block", "blank"):
        by_path = {}
        for path in ("engine", "reference"):
            scorer = Scorer(vlm, {"ocr": [10]}, ablation, path)
            by_path[path] = scorer.score(rows)
            assert not scorer.rejected and not scorer.cost.reasons
        for one, other in zip(by_path["engine"], by_path["reference"], strict=True):
            assert one.deltas["ocr"] == pytest.approx(other.deltas["ocr"], abs=1e-4)
            assert one.visual_gain == pytest.approx(other.visual_gain, abs=1e-4)
            assert abs(one.visual_gain) > 0.1 and "text_only" not in one.flags


def test_select_writes_rows_with_videos_as_they_were(pool, tmp_path, caplog):
    from vfl_train.data_select.run import select

    zeros = [0.0] * LAYERS
    ocr = FunctionProfile("ok", 50, 50, zeros, zeros, [[0.0, 1.0]] * LAYERS, {}, 10, [10], [10], False)
    info = ModelInfo("phantom", None, "qwen2_5_vl", LAYERS, WIDTH)
    found = Profile(info, "swap", "text", "reference", "float32", 0, {}, {}, {"ocr": ocr})
    (tmp_path / "profile.json").write_text(json.dumps(found.to_json()), encoding="utf-8")
    config = SelectConfig(
        profile=str(tmp_path / "profile.json"), data=str(pool), output=tmp_path / "out", budget="0.5",
        method="visual-gain", device="cpu", emit="swift",
    )  # fmt: skip
    record = select(config)
    lines = pool.read_bytes().splitlines()
    chosen = (config.output / "selected.jsonl").read_bytes().splitlines()
    assert record["rows_kept"] == 12 and len(chosen) == 6 and set(chosen) <= set(lines)
    filmed = sum(b"<video>" in line for line in chosen)
    assert filmed and f"{filmed} rows with videos" in caplog.text
    assert len((config.output / "swift.jsonl").read_bytes().splitlines()) == 6 - filmed


def test_lora_trains_on_videos_and_the_prefix_cache_changes_nothing(pool, base_folder, tmp_path):
    from safetensors.torch import load_file

    from vfl_train.training.run import train_lora

    def trained(name: str, **settings: object) -> dict[str, torch.Tensor]:
        config = LoraConfig(
            model=str(base_folder), data=str(pool), output=tmp_path / name, device="cpu", layers="8",
            max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=1, learning_rate=1e-3,
            logging_steps=1, **settings,
        )  # fmt: skip
        return load_file(train_lora(config) / "adapter_model.safetensors")

    plain, cached = trained("plain"), trained("cached", cache_prefix=True, cache_dir=tmp_path / "cache")
    assert any(bool(t.any()) for name, t in plain.items() if "lora_B" in name)
    for name, tensor in plain.items():
        torch.testing.assert_close(cached[name], tensor, atol=1e-5, rtol=1e-3)


def test_eval_asks_about_videos(pool, tmp_path):
    from vfl_train.evaluation.run import evaluate

    scores = evaluate(EvalConfig(model="phantom", data=str(pool), output=tmp_path / "out", device="cpu"))
    assert {name: found.n for name, found in scores.items()} == {"ocr": 6, "emotion": 6}
