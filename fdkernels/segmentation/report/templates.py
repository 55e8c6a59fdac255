"""The templates of the page, for Jinja2: HTML with its pictures inside, and Markdown with them beside."""

from __future__ import annotations

HTML = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ page.title }}</title>
<style>
body { margin: 0 auto; padding: 1rem 1.5rem 4rem; max-width: 72rem; color: #1a1a1a; background: #fff;
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; }
h2 { font-size: 1.3rem; margin-top: 2.5rem; border-bottom: 1px solid #999; }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
.summary { padding: .8rem 1.2rem; border-left: 4px solid #0072b2; background: #f2f6f9; max-width: 46rem; }
.notes { padding: .6rem 1.2rem .6rem 2rem;
  border-left: 4px solid #d55e00; background: #fdf5ef; max-width: 46rem; }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; height: auto; }
figcaption, caption { text-align: left; color: #333; font-size: .95rem; padding: .3rem 0; max-width: 46rem; }
.scroll { overflow-x: auto; margin: 1.2rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ccc; text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid #555; } th.number, td.number { text-align: right; }
td.number { white-space: nowrap; } td.word { max-width: 34rem; overflow-wrap: break-word; }
tr.own { font-weight: bold; background: #eaf3fa; }
@media print { body { max-width: none; font-size: 10.5pt; } h2, figcaption, caption { break-after: avoid; }
  figure, tr { break-inside: avoid; } .scroll { overflow: visible; } nav { display: none; } }
</style>
</head>
<body>
<h1>{{ page.title }}</h1>
<div class="summary">
{% for paragraph in page.summary %}<p>{{ paragraph }}</p>
{% endfor %}</div>
<nav aria-label="Contents"><ol>
{% for section in page.sections %}<li><a href="#section-{{ loop.index }}">{{ section.title }}</a></li>
{% endfor %}</ol></nav>
{% for section in page.sections %}
<section id="section-{{ loop.index }}">
<h2>{{ section.title }}</h2>
{% for block in section.blocks %}{% if block is text_block %}
<p>{{ block.text }}</p>
{% elif block is notes_block %}
<ul class="notes">
{% for item in block["items"] %}<li>{{ item }}</li>
{% endfor %}</ul>
{% elif block is table_block %}
<div class="scroll"><table>
<caption>{{ block.caption }}</caption>
<thead><tr>
{% for name in block.columns %}
<th scope="col" class="{{ 'word' if loop.index0 < block.texts else 'number' }}">{{ name }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in block.rows %}
<tr{% if loop.index0 in block.own %} class="own"{% endif %}>
{% for cell in row %}
<td class="{{ 'word' if loop.index0 < block.texts else 'number' }}">{{ cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table></div>
{% else %}
<figure>
<img src="{{ block | data_uri }}" alt="{{ block.alt }}">
<figcaption>{{ block.caption }}</figcaption>
</figure>
{% endif %}{% endfor %}
</section>
{% endfor %}
</body>
</html>
"""

MARKDOWN = """\
# {{ page.title }}

{% for paragraph in page.summary %}
{{ paragraph }}

{% endfor %}

{% for section in page.sections %}
## {{ section.title }}

{% for block in section.blocks %}{% if block is text_block %}
{{ block.text }}

{% elif block is notes_block %}
{% for item in block["items"] %}
- {{ item }}
{% endfor %}

{% elif block is table_block %}
{{ block.caption }}

|{% for name in block.columns %} {{ name }} |{% endfor %}

|{% for name in block.columns %}{{ raw(" --- |" if loop.index0 < block.texts else " ---: |") }}{% endfor %}

{% for row in block.rows %}
{% set mark = raw("**" if loop.index0 in block.own else "") %}
| {{ mark }}{{ row[0] }}{{ mark }} |{% for cell in row[1:] %} {{ cell }} |{% endfor %}

{% endfor %}

{% else %}
![{{ block.alt }}]({{ block | file }})

{{ block.caption }}

{% endif %}{% endfor %}{% endfor %}
"""

__all__ = ["HTML", "MARKDOWN"]
