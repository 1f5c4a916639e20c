"""How the page looks and what happens in the browser: theme, style sheet, scripts. No font and no script is fetched from anywhere."""

from __future__ import annotations

import gradio as gr

THEME = gr.themes.Default(
    primary_hue="teal",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(
    body_text_color_subdued="*neutral_500",
    body_text_color_subdued_dark="*neutral_400",
    block_info_text_color="*neutral_500",
    block_info_text_color_dark="*neutral_400",
)

CSS = """
.gradio-container {width: 100%; max-width: 1680px !important; margin: 0 auto}
.gradio-container .main {padding: 1rem !important}
.html-container {padding: 0 !important}
#methods .html-container {padding: var(--block-padding) !important}
#model input {padding-right: 2rem; text-overflow: ellipsis}
#head h1 {font-size: 1.5rem; margin: 0}
#head p {margin: .2rem 0 0; color: var(--body-text-color-subdued)}
#picture img {width: 100%; height: 100%; object-fit: contain}
#status:not(:has(.vp-said)) {display: none}

.vp-examples {display: flex; gap: .6rem; overflow-x: auto; padding: 2px 2px .3rem}
.vp-examples button {display: flex; align-self: stretch; margin: 0; align-items: center; gap: .6rem; flex: 1 0 190px; padding: .4rem; text-align: left;
  border: 1px solid var(--border-color-primary); border-radius: .6rem; background: var(--block-background-fill);
  color: var(--body-text-color); cursor: pointer}
.vp-examples button:hover {border-color: var(--primary-500)}
.vp-examples img {width: 52px; height: 52px; border-radius: .35rem; margin: 0}
.vp-examples span {font-size: .82rem; line-height: 1.25; font-weight: 400; text-wrap: balance}

.vp-title {font-size: var(--block-title-text-size); color: var(--block-title-text-color); margin: 0 0 .3rem}
.vp-methods {max-height: 22rem; overflow-y: auto}
.vp-methods fieldset {border: 0; padding: 0; margin: 0 0 .5rem}
.vp-methods legend {font-size: .75rem; font-weight: 600; padding: .2rem 0}
.vp-methods label {display: flex; gap: .5rem; align-items: baseline; padding: .2rem .1rem; font-size: .82rem; line-height: 1.3;
  cursor: pointer; color: var(--body-text-color-subdued)}
.vp-methods label b {color: var(--body-text-color); margin-right: .25rem}
.vp-methods input {flex: none; position: relative; top: .15rem}
#methods details {font-size: .78rem; color: var(--body-text-color-subdued); margin-top: .4rem; overflow-wrap: anywhere}

.vp-status {display: flex; align-items: center; gap: .8rem; font-size: .88rem}
.vp-status progress {flex: 1; min-width: 4rem; height: .4rem; border: 0; border-radius: .2rem; overflow: hidden; appearance: none;
  background: var(--border-color-primary)}
.vp-status progress::-webkit-progress-bar {background: var(--border-color-primary)}
.vp-status progress::-webkit-progress-value {background: var(--primary-500)}
.vp-status progress::-moz-progress-bar {background: var(--primary-500)}
.vp-line {font-size: .88rem; color: var(--body-text-color-subdued)}
.vp-fault {font-size: .88rem; border: 1px solid #dc2626; border-left-width: 4px; border-radius: .4rem; padding: .5rem .7rem; overflow-wrap: anywhere}

.vp-empty {border: 1px dashed var(--border-color-primary); border-radius: .7rem; padding: 3rem 1.5rem; text-align: center;
  color: var(--body-text-color-subdued)}
.vp-results {display: grid; gap: .9rem; grid-template-columns: minmax(0, 1fr)}
.vp-stage {display: flex; align-items: center; gap: .8rem; font-size: .88rem; font-weight: 600}
.vp-stage input {flex: 1; max-width: 22rem; accent-color: var(--primary-500)}
.vp-stage output {font-weight: 400; color: var(--body-text-color-subdued); min-width: 6rem}
.vp-cards {display: grid; grid-template-columns: repeat(auto-fill, minmax(186px, 1fr)); gap: .8rem}
@media (max-width: 640px) {.vp-cards {grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .5rem}}
.vp-card {display: grid; grid-row: span 5; grid-template-rows: subgrid; gap: .5rem; padding: .7rem; min-width: 0; border-radius: .7rem;
  border: 1px solid var(--border-color-primary); background: var(--block-background-fill); align-items: start}
.vp-card h3 {margin: 0; font-size: 1rem}
.vp-card code {display: block; font-size: .7rem; color: var(--body-text-color-subdued); overflow-wrap: anywhere; background: none;
  border: 0; padding: 0}
.vp-answer {font-size: 1.05rem; font-weight: 600; margin: 0; overflow-wrap: anywhere}
.vp-answer mark {background: #fde68a; color: #713f12; border-radius: .2rem; padding: 0 .15rem}
.vp-same, .vp-other {font-size: .76rem}
.vp-same {color: #0f766e}
.vp-other {color: #b45309}
.dark .vp-same {color: #5eead4}
.dark .vp-other {color: #fcd34d}
.vp-card figure {margin: 0}
.vp-card figcaption {font-size: .76rem; color: var(--body-text-color-subdued); margin-top: .25rem}
.vp-seen {position: relative; width: 100%; background: var(--seen) 0 0 / 100% 100%; border-radius: .3rem; overflow: hidden}
.vp-seen i {position: absolute; inset: 0; background-size: 100% 100%; image-rendering: pixelated}
.vp-card dl {margin: 0; font-size: .8rem}
.vp-card dl div {display: grid; grid-template-columns: 3.6rem 1fr; padding: .15rem 0}
.vp-card dt {color: var(--body-text-color-subdued)}
.vp-card dd {margin: 0}
.vp-bar {display: block; height: 3px; margin-top: .15rem; border-radius: 2px;
  background: linear-gradient(to right, var(--primary-500) var(--share), var(--border-color-primary) var(--share))}
.vp-note {font-size: .78rem; margin: 0; padding: .4rem .5rem; border-radius: .4rem; background: var(--background-fill-secondary);
  overflow-wrap: anywhere}
.vp-how {font-size: .78rem; color: var(--body-text-color-subdued); margin: 0; overflow-wrap: anywhere}
.vp-copies {display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: .8rem; align-items: start}
.vp-copy {min-width: 0; border: 1px solid var(--border-color-primary); border-radius: .7rem; overflow: hidden}
.vp-copy header {display: flex; justify-content: space-between; align-items: center; padding: .4rem .7rem}
.vp-copy h4 {margin: 0; font-size: .85rem}
.vp-copy button {font-size: .78rem; padding: .15rem .6rem; border: 1px solid var(--border-color-primary); border-radius: .35rem;
  background: var(--block-background-fill); color: var(--body-text-color); cursor: pointer}
.vp-copy pre {margin: 0; padding: .7rem; overflow: auto; max-height: 15rem; font-size: .72rem;
  background: var(--background-fill-secondary)}
.vp-results [hidden] {display: none}
.vp-results :focus-visible, .vp-examples :focus-visible, #methods :focus-visible {outline: 2px solid var(--primary-500);
  outline-offset: 1px}
"""

RESULTS_JS = """
const show = () => {
  const slider = element.querySelector('.vp-stage input');
  if (!slider) return;
  const stage = Number(slider.value), last = Number(slider.max);
  slider.nextElementSibling.textContent =
    stage === 0 ? 'before any' : stage === last ? 'after the last' : `after stage ${stage}`;
  for (const card of element.querySelectorAll('[data-stages]')) {
    const at = Math.min(stage, Number(card.dataset.stages));
    for (const part of card.querySelectorAll('[data-at]')) part.hidden = Number(part.dataset.at) !== at;
  }
};
const copy = async (button) => {
  const pre = button.closest('.vp-copy').querySelector('pre');
  if (navigator.clipboard) await navigator.clipboard.writeText(pre.textContent);
  else {  // a page that came neither by https nor from this machine has no clipboard, but may copy what is selected
    getSelection().selectAllChildren(pre);
    document.execCommand('copy');
  }
  button.textContent = 'Copied';
  setTimeout(() => { button.textContent = 'Copy'; }, 1500);
};
element.addEventListener('input', show);
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-copy]');
  if (button) copy(button);
});
watch('value', () => {
  show();
  const narrow = innerWidth < 700;  // there the answers stand far below the question
  if (narrow && element.querySelector('.vp-copies')) element.scrollIntoView();
});
"""

EXAMPLES_JS = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-example]');
  if (button) trigger('click', {number: Number(button.dataset.example)});
});
"""

TICKED_JS = """
(picture, prompt, model, methods, budget) => {
  window.stopped = false;
  const ticked = Array.from(document.querySelectorAll('#methods input:checked'), (box) => box.value);
  return [picture, prompt, model, ticked, budget];
}
"""
"""The boxes are the page's own, so what is ticked is read off them as a question leaves."""

STOP_JS = "() => { window.stopped = true; }"
STOPPED_JS = "() => [window.stopped]"
