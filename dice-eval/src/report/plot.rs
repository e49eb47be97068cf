//! Figures as SVG that take their ink from the page: legible on light and on dark.

use anyhow::{Result, anyhow};
use maud::{Markup, PreEscaped, html};
use plotters::coord::Shift;
use plotters::prelude::*;

/// Drawn in this colour, replaced by the page's own text colour afterwards.
const INK: RGBColor = RGBColor(1, 2, 3);
const INK_IN_SVG: &str = "#010203";

/// Colours of series, told apart by most colour-blind readers, legible on white and on black.
pub const COLOURS: [RGBColor; 5] = [
    RGBColor(0x3b, 0x8b, 0xd0),
    RGBColor(0xdd, 0x7a, 0x20),
    RGBColor(0x2a, 0x9d, 0x6e),
    RGBColor(0xb0, 0x6a, 0xc8),
    RGBColor(0xd6, 0x4b, 0x5f),
];

/// On a phone it shrinks to two thirds, on a wide screen it grows by a sixth: letters are sized for both.
const SIZE: (u32, u32) = (480, 280);

/// A figure to draw.
pub struct Plot<'a> {
    pub title: &'a str,
    /// What the axes count.
    pub axes: [&'a str; 2],
    pub series: Vec<Series>,
    /// What to read from it, in words.
    pub note: String,
}

pub struct Series {
    /// For the legend; without one it is not in it.
    pub name: String,
    pub colour: RGBColor,
    pub mark: Mark,
}

pub enum Mark {
    /// A figure that scatters from step to step: a faint line, and its moving mean over it.
    Course(Vec<(f64, f64)>),
    /// A line that keeps its value until the next point.
    Steps(Vec<(f64, f64)>),
    Points(Vec<(f64, f64)>),
    /// (from, to, height), standing on 0.
    Bars(Vec<(f64, f64, f64)>),
    /// (place, low, value, high)
    Intervals(Vec<(f64, f64, f64, f64)>),
    /// A line from bottom to top.
    At(f64),
    /// A line from side to side: what the others are to be compared with.
    Level(f64),
}

impl Series {
    /// The series number `at` of a figure.
    pub fn new(at: usize, name: impl Into<String>, mark: Mark) -> Self {
        Self {
            name: name.into(),
            colour: COLOURS[at % COLOURS.len()],
            mark,
        }
    }

    /// A thin line to compare with.
    pub fn level(at: f64) -> Self {
        Self {
            name: String::new(),
            colour: INK,
            mark: Mark::Level(at),
        }
    }
}

impl Mark {
    /// Every point that must be within the axes.
    fn extent(&self) -> Vec<(f64, f64)> {
        match self {
            Self::Course(points) | Self::Steps(points) | Self::Points(points) => points.clone(),
            Self::Bars(bars) => bars
                .iter()
                .flat_map(|&(from, to, height)| [(from, 0.0), (to, height)])
                .collect(),
            Self::Intervals(all) => all
                .iter()
                .flat_map(|&(x, low, _, high)| [(x - 0.5, low), (x + 0.5, high)])
                .collect(),
            Self::At(x) => vec![(*x, f64::NAN)],
            Self::Level(y) => vec![(f64::NAN, *y)],
        }
    }

    /// Whether it has data of its own.
    fn is_data(&self) -> bool {
        !matches!(self, Self::At(_) | Self::Level(_)) && !self.extent().is_empty()
    }
}

impl Plot<'_> {
    /// The figure with its legend and note; nothing where there is nothing to draw.
    pub fn markup(&self) -> Result<Markup> {
        if !self.series.iter().any(|series| series.mark.is_data()) {
            return Ok(html! {});
        }
        let svg = self
            .svg()
            .map_err(|err| anyhow!("cannot draw \"{}\": {err}", self.title))?;
        let label = format!(
            "{}: {} over {}. {}",
            self.title, self.axes[1], self.axes[0], self.note
        );
        let hex = |c: RGBColor| format!("color:#{:02x}{:02x}{:02x}", c.0, c.1, c.2);
        let named = |series: &&Series| {
            !series.name.is_empty() && (series.mark.is_data() || matches!(series.mark, Mark::At(_)))
        };
        Ok(html! {
            figure {
                figcaption { strong { (self.title) } }
                p.legend {
                    @for series in self.series.iter().filter(named) {
                        span { span.swatch style=(hex(series.colour)) aria-hidden="true" { "■" } " " (series.name) } " "
                    }
                }
                div role="img" aria-label=(label) { (PreEscaped(svg)) }
                @if !self.note.is_empty() { p.note { (self.note) } }
            }
        })
    }

    fn svg(&self) -> Result<String, Box<dyn std::error::Error>> {
        let mut svg = String::new();
        {
            let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
            self.draw(&area)?;
            area.present()?;
        }
        Ok(svg.replace(INK_IN_SVG, "currentColor"))
    }

    fn draw(
        &self,
        area: &DrawingArea<SVGBackend, Shift>,
    ) -> Result<(), Box<dyn std::error::Error>> {
        let points: Vec<(f64, f64)> = self.series.iter().flat_map(|s| s.mark.extent()).collect();
        let (x, y) = (
            range(points.iter().map(|p| p.0)),
            range(points.iter().map(|p| p.1)),
        );
        let text = |size: i32| ("sans-serif", size).into_font().color(&INK);
        let mut chart = ChartBuilder::on(area)
            .margin(6)
            .margin_right(18)
            .x_label_area_size(48)
            .y_label_area_size(72)
            .build_cartesian_2d(x.0..x.1, y.0..y.1)?;
        chart
            .configure_mesh()
            .light_line_style(INK.mix(0.0))
            .bold_line_style(INK.mix(0.15))
            .axis_style(INK.mix(0.6))
            // The library's sizes are 1.24 times those of the letters.
            .label_style(text(17))
            .axis_desc_style(text(18))
            .x_labels(6)
            .y_labels(5)
            .x_label_formatter(&|v| match self.axes[0] {
                // There is no half of a round or a step.
                "round" | "step" if v.fract().abs() > 1e-9 => String::new(),
                _ => label(*v, x.1 - x.0),
            })
            .y_label_formatter(&|v| label(*v, y.1 - y.0))
            .x_desc(self.axes[0])
            .y_desc(self.axes[1])
            .draw()?;
        for series in &self.series {
            let colour = series.colour;
            let line = colour.stroke_width(2);
            match &series.mark {
                Mark::Course(points) => {
                    let faint = colour.mix(0.35).stroke_width(1);
                    chart.draw_series(LineSeries::new(points.iter().copied(), faint))?;
                    chart.draw_series(LineSeries::new(moving_mean(points), line))?;
                    if let [only] = points[..] {
                        // A single step would be no line at all.
                        chart.draw_series([Circle::new(only, 3, colour.filled())])?;
                    }
                }
                Mark::Steps(points) => {
                    let last = points.last().map(|p| (x.1, p.1));
                    let corners = points.windows(2).flat_map(|w| [w[0], (w[1].0, w[0].1)]);
                    let all: Vec<_> = corners.chain(points.last().copied()).chain(last).collect();
                    chart.draw_series(LineSeries::new(all, line))?;
                }
                Mark::Points(points) => {
                    let dots = points
                        .iter()
                        .map(|p| Circle::new(*p, 2, colour.mix(0.5).filled()));
                    chart.draw_series(dots)?;
                }
                Mark::Bars(bars) => {
                    let boxes = bars.iter().filter(|bar| bar.2 > 0.0);
                    for &(from, to, height) in boxes {
                        let corners = [(from, 0.0), (to, height)];
                        let fill = Rectangle::new(corners, colour.mix(0.3).filled());
                        let edge = Rectangle::new(corners, colour.stroke_width(1));
                        chart.draw_series([fill, edge])?;
                    }
                }
                Mark::Intervals(all) => {
                    for &(at, low, value, high) in all {
                        chart.draw_series([PathElement::new([(at, low), (at, high)], line)])?;
                        chart.draw_series([Circle::new((at, value), 4, colour.filled())])?;
                    }
                }
                Mark::At(at) => {
                    let ends = [(*at, y.0), (*at, y.1)];
                    chart.draw_series([PathElement::new(ends, line)])?;
                }
                Mark::Level(at) => {
                    let ends = [(x.0, *at), (x.1, *at)];
                    let thin = colour.mix(0.6).stroke_width(1);
                    chart.draw_series([PathElement::new(ends, thin)])?;
                }
            }
        }
        Ok(())
    }
}

/// The mean of each point's neighbourhood, a tenth of the whole; fewer than twenty points stay as they are.
fn moving_mean(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let reach = points.len() / 20;
    let mean = |at: usize| {
        let around = &points[at.saturating_sub(reach)..(at + reach + 1).min(points.len())];
        let sum: f64 = around.iter().map(|p| p.1).sum();
        (points[at].0, sum / around.len() as f64)
    };
    (0..points.len()).map(mean).collect()
}

/// From the least to the greatest value, with a little air; never empty.
fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    // An axis is as long as the difference, which must be a number, too.
    let finite = values.filter(|v| v.abs() < 1e300);
    let (low, high) = finite.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| {
        (low.min(v), high.max(v))
    });
    let size = low.abs().max(high.abs());
    match high - low {
        width if width > size / 1000.0 => (low - 0.03 * width, high + 0.05 * width),
        // Ticks between such values would need more digits than there is room for.
        width if width > 0.0 => (low - 0.01 * size, high + 0.01 * size),
        0.0 => (low - 0.5 - 0.1 * low.abs(), high + 0.5 + 0.1 * high.abs()),
        _ => (0.0, 1.0),
    }
}

/// A number on an axis of this width, as short as it can be.
fn label(value: f64, width: f64) -> String {
    let finest = width.abs().log10().floor() - 2.0;
    if (1e-12..1e-4).contains(&value.abs()) && finest < -5.0 {
        // As many digits as the axis tells apart; longer ones would run into its title.
        let digits = (value.abs().log10().floor() - finest).clamp(0.0, 2.0) as usize;
        let text = format!("{value:.digits$e}");
        let (number, power) = text.split_once('e').expect("it was asked for");
        return format!("{}e{power}", without_zeros(number));
    }
    let decimals = (-finest).clamp(0.0, 8.0) as usize;
    match without_zeros(&format!("{value:.decimals$}")) {
        "-0" => "0".into(),
        short => short.to_owned(),
    }
}

/// A number without the zeros that end its decimals.
fn without_zeros(text: &str) -> &str {
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.'),
        false => text,
    }
}

/// Bars of both sides over the same bins, from the least to the greatest of `over`.
pub fn histogram(names: [&str; 2], sides: &[Vec<f64>; 2], over: &[f64]) -> Vec<Series> {
    const BINS: usize = 24;
    let (low, high) = range(over.iter().copied());
    let width = (high - low) / BINS as f64;
    let bars = |values: &[f64]| -> Vec<_> {
        let mut counts = [0.0; BINS];
        let finite: Vec<f64> = values.iter().copied().filter(|v| v.is_finite()).collect();
        for value in &finite {
            counts[(((value - low) / width) as usize).min(BINS - 1)] += 1.0;
        }
        let bar = |(i, count): (usize, f64)| {
            let from = low + i as f64 * width;
            (from, from + width, count)
        };
        match finite[..] {
            [] => vec![],
            // Empty bins, too: they hold the axis at its whole length.
            _ => counts.into_iter().enumerate().map(bar).collect(),
        }
    };
    let sides = names.into_iter().zip(sides).enumerate();
    sides
        .map(|(at, (name, values))| Series::new(at, name, Mark::Bars(bars(values))))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_beyond_all_axes_do_not_hold_it_up() {
        for far in [1.7e308, 1e308, f64::INFINITY, f64::NAN] {
            let course = Mark::Course(vec![(0.0, 1.0), (1.0, far), (2.0, -far)]);
            let plot = Plot {
                title: "t",
                axes: ["x", "y"],
                series: vec![Series::new(0, "s", course)],
                note: String::new(),
            };
            plot.markup().unwrap();
        }
    }

    #[test]
    fn every_mark_is_drawn_in_the_pages_ink() {
        let marks = [
            Mark::Course(vec![(0.0, 1.0), (1.0, 2.0)]),
            Mark::Steps(vec![(0.0, 3.0), (0.5, 1.0)]),
            Mark::Points(vec![(0.2, 0.2)]),
            Mark::Bars(vec![(0.0, 0.5, 2.0)]),
            Mark::Intervals(vec![(1.0, 0.5, 1.0, 1.5)]),
            Mark::At(0.7),
            Mark::Level(0.4),
        ];
        let series = marks
            .into_iter()
            .enumerate()
            .map(|(i, m)| Series::new(i, format!("<s{i}>"), m));
        let plot = Plot {
            title: "t & u",
            axes: ["x", "y"],
            series: series.collect(),
            note: "n".into(),
        };
        let markup = plot.markup().unwrap().into_string();
        assert!(markup.contains("currentColor") && !markup.contains(INK_IN_SVG));
        for element in [
            "<polyline",
            "<circle",
            "<rect",
            "&lt;s5&gt;",
            "t &amp; u",
            "viewBox",
        ] {
            assert!(markup.contains(element), "{element}");
        }
        assert!(!markup.contains("NaN"), "{markup}");
    }

    #[test]
    fn nothing_to_draw_is_no_figure() {
        let plot = Plot {
            title: "t",
            axes: ["x", "y"],
            series: histogram(["a", "b"], &[vec![], vec![f64::NAN]], &[f64::NAN]),
            note: String::new(),
        };
        assert_eq!(plot.markup().unwrap().into_string(), "");
        let same = histogram(["a", "b"], &[vec![3.0, 3.0], vec![]], &[3.0]);
        assert!(
            matches!(&same[0].mark, Mark::Bars(bars) if bars.iter().map(|b| b.2).sum::<f64>() == 2.0)
        );
    }

    #[test]
    fn an_axis_is_as_wide_as_its_labels_can_tell() {
        let axis = |values: &[f64]| range(values.iter().copied());
        let (low, high) = axis(&[0.5931472, 0.5931480]);
        assert_eq!(label(low, high - low), "0.5872");
        assert!(axis(&[-1e-6, 0.0]).1 < 1e-7);
        assert_eq!(axis(&[2.0, 2.0]), (1.3, 2.7));
    }

    #[test]
    fn labels_are_short() {
        for (value, width, text) in [
            (0.5, 1.0, "0.5"),
            (1000.0, 2000.0, "1000"),
            (-0.0001, 10.0, "0"),
            (0.00021, 0.0004, "0.00021"),
            (-0.000002, 0.000004, "-2e-6"),
            (0.0000125, 0.00003, "1.25e-5"),
            (0.00002, 2.0, "0"),
            (1.000002, 0.000004, "1.000002"),
        ] {
            assert_eq!(label(value, width), text);
        }
    }
}
